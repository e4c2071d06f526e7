"""A fold holds for what both layers were when the convolution ran. What changes after that ends it: Eval's results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.right_or_named import MODES, Pair, Use, assert_same, check_right_or_named, image, pair, results
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_convbn import conv_bn_mode, get_mode, set_mode

IN_EVERY_MODE = pytest.mark.parametrize(("mode", "recompute"), MODES)


def between(change: Callable[[Pair], Any]) -> Use:
    """A forward that changes the pair between its layers."""

    def use(net: Pair, input: Tensor) -> Tensor:
        output = net.conv(input)
        change(net)
        return net.bn(output)  # type: ignore[no-any-return]

    return use


def writes_statistics(net: Pair) -> None:
    with torch.no_grad():
        net.bn.running_var.fill_(2.0)


def replaces_statistics(net: Pair) -> None:
    net.bn.running_mean = torch.linspace(-1, 1, 8, dtype=torch.float64)


def replaces_shift(net: Pair) -> None:
    net.bn.bias = nn.Parameter(net.bn.bias.detach() + 1)


def sets_eps(net: Pair) -> None:
    net.bn.eps = 0.5


def calls_with_other_parameters(net: Pair, input: Tensor) -> Tensor:
    others = {name: 2 * parameter for name, parameter in net.bn.named_parameters()}
    return functional_call(net.bn, others, (net.conv(input),))  # type: ignore[no-any-return]


def begins_a_checkpoint(net: Pair, input: Tensor) -> Tensor:
    return checkpoint(lambda output: F.silu(net.bn(output)), net.conv(input), use_reentrant=False)  # type: ignore[no-any-return]


def ends_one_checkpoint_and_begins_another(net: Pair, input: Tensor) -> Tensor:
    output = checkpoint(net.conv, input, use_reentrant=False)
    return checkpoint(net.bn, output, use_reentrant=False)  # type: ignore[no-any-return]


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def sets_a_class(net: Pair, input: Tensor) -> Tensor:
    net.conv.__class__ = Doubled
    return net(input)  # type: ignore[no-any-return]


@IN_EVERY_MODE
@pytest.mark.parametrize(
    "use",
    [
        *map(between, (writes_statistics, replaces_statistics, replaces_shift, sets_eps)),
        *(calls_with_other_parameters, begins_a_checkpoint, ends_one_checkpoint_and_begins_another, sets_a_class),
    ],
    ids=lambda use: use.__name__,
)
def test_what_changes_gives_evals_results(use: Use, mode: Any, recompute: Any) -> None:
    assert check_right_or_named(use, mode, recompute)


def test_a_geometry_in_numbers_and_lists_is_that_of_the_layer() -> None:
    net = pair()
    net.conv.padding, net.conv.stride, net.conv.dilation = 1, 2, [1, 1]  # type: ignore[assignment]
    expected = results(net, Pair.__call__)
    set_mode(net, "tune")
    assert_same(results(net, Pair.__call__), expected)


class Noted(Tensor):
    """A tensor that doubles what a convolution puts out."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * output if func is torch.conv2d else output


def test_another_subclass_of_tensor_handles_both_layers_by_itself() -> None:
    net = pair()
    expected = net(image().as_subclass(Noted))
    set_mode(net, "tune")
    found = net(image().as_subclass(Noted))
    assert type(found) is type(expected) is Noted
    assert_same([found.as_subclass(Tensor)], [expected.as_subclass(Tensor)])


def test_data_parallel_is_refused_after_the_switch_and_works_again_after_a_restore() -> None:
    net = pair()
    set_mode(net, "tune")
    with pytest.raises(RuntimeError, match=r"DataParallel: this Conv2d is converted by set_mode"):
        net.conv._replicate_for_data_parallel()
    set_mode(net, "train")
    assert type(net.conv._replicate_for_data_parallel()) is nn.Conv2d


@pytest.mark.parametrize("recompute", ["none", "elementwise", "blocks"])
def test_where_saved_tensor_hooks_are_forbidden_the_results_are_evals(recompute: Any) -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)) for _ in range(2)))
    net.double().eval()
    expected = results(net, nn.Module.__call__)
    set_mode(net, "tune", recompute=["0", "1"] if recompute == "blocks" else recompute)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_same(results(net, nn.Module.__call__), expected)


class Interrupts(nn.BatchNorm2d):
    """A BatchNorm at which the first switch is interrupted."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and vars(self).pop("ready", False):
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def test_a_switch_that_is_interrupted_leaves_plain_modules() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), Interrupts(8)).eval()
    before = [set(vars(module)) for module in net.modules()]
    vars(net[3])["ready"] = True
    with pytest.raises(KeyboardInterrupt), conv_bn_mode(net, "tune"):
        pass
    assert get_mode(net) == "train"
    assert [set(vars(module)) for module in net.modules()] == before
