"""The output between the layers of a pair, read late or differentiated: Eval's, or an error that names the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.comparing import assert_close
from helpers.model_checks import randomized
from helpers.networks import images
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_convbn import set_mode

MODES = pytest.mark.parametrize("mode", ["tune", "deploy"])
TOO_LATE = r"Conv2d\(3, 4, .*BatchNorm2d\(4, .*the input or the weight of the convolution was written since"
UNCOUNTED = r"Conv2d\(3, 4, .*in inference mode, .* but the input or the normalised output was written since"
NO_GRADIENT = r"Conv2d\(3, 4, .*is wanted too late: call its retain_grad\(\) before the BatchNorm runs"


def layers(*between: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), *between, nn.Conv2d(4, 2, 1))
    return randomized(net.to(dtype).eval())  # type: ignore[return-value]


def image(dtype: torch.dtype = torch.float64) -> Tensor:
    return images(2, 3, 8, 8, dtype=dtype)


# --------------------------------------------------------------------------------------------------- inference mode


@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tap_that_is_read_in_inference_mode_is_evals(mode: Any, dtype: torch.dtype) -> None:
    """Before and after the BatchNorm has run."""
    net, input = layers(dtype=dtype), image(dtype)
    expected = net[0](input)
    set_mode(net, mode)
    with torch.inference_mode():
        input = input.clone()
        before, after = net[0](input), net[0](input)
        output = net[1](after)
        read = [before + 0, after + 0]
        assert_close([net[1](before)], [output], 1e-10 if dtype is torch.float64 else 3e-2)
    assert_close(read, [expected, expected], 0)


@MODES
@pytest.mark.parametrize("norm_runs", [True, False])
def test_a_tap_that_is_read_in_inference_mode_after_a_write_to_the_input_is_an_error(
    mode: Any, norm_runs: bool
) -> None:
    net = layers()
    set_mode(net, mode)
    with torch.inference_mode():
        input = image().clone()
        tap = net[0](input)
        if norm_runs:
            net[1](tap)
        input[0, 0, 0, 0] += 0.1
        with pytest.raises(RuntimeError, match=UNCOUNTED):
            tap.sum()


def test_a_tap_that_is_read_in_inference_mode_after_a_write_to_the_normalised_output_is_an_error() -> None:
    """As by a ReLU in place: nothing is left to compare with."""
    net = layers(nn.ReLU(inplace=True))
    set_mode(net, "tune")
    with torch.inference_mode():
        tap = net[0](image().clone())
        net[1:](tap)
        with pytest.raises(RuntimeError, match=UNCOUNTED):
            tap.sum()


@MODES
def test_under_no_grad_a_write_to_the_normalised_output_does_not_matter(mode: Any) -> None:
    net, input = layers(nn.ReLU(inplace=True)), image()
    expected = net[0](input)
    set_mode(net, mode)
    with torch.no_grad():
        tap = net[0](input)
        net[1:](tap)
        assert_close([tap + 0], [expected], 1e-12)


# -------------------------------------------------------------------------------------------------------- gradients


def gradient_of(net: nn.Sequential, *, ask_before: Callable[[Tensor], Any] | None) -> Tensor:
    tap = net[0](image().requires_grad_())
    if ask_before is not None:
        ask_before(tap)
    return torch.autograd.grad(net[1:](tap).square().sum(), tap)[0]


@MODES
@pytest.mark.parametrize("between", [(), (nn.ReLU(inplace=True),)])
def test_the_gradient_of_a_tap_is_an_error_that_says_how_it_is_to_be_had(mode: Any, between: Any) -> None:
    expected = gradient_of(layers(*between), ask_before=None)
    net = layers(*between)
    set_mode(net, mode)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        gradient_of(net, ask_before=None)
    for ask in (Tensor.retain_grad, lambda tap: tap.register_hook(lambda gradient: None)):
        assert_close([gradient_of(net, ask_before=ask)], [expected], 1e-12)


@pytest.mark.parametrize("ask", [Tensor.retain_grad, lambda tap: tap.register_hook(lambda gradient: None)])
def test_a_gradient_asked_for_after_the_norm_is_an_error(ask: Callable[[Tensor], Any]) -> None:
    net = layers()
    set_mode(net, "tune")
    tap = net[0](image())
    net[1](tap)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        ask(tap)


@MODES
def test_the_gradient_of_a_tap_is_evals_where_the_norm_plays_no_part(mode: Any) -> None:
    def gradients(net: nn.Sequential) -> list[Tensor]:
        input = image().requires_grad_()
        tap = net[0](input)
        normalised = net[1](tap)
        of_tap = torch.autograd.grad(tap.square(), (input, tap), torch.ones_like(tap), retain_graph=True)
        unused = torch.autograd.grad(tap.sum(), (tap, normalised), allow_unused=True, retain_graph=True)
        assert unused[1] is None
        return [*of_tap, unused[0], *torch.autograd.grad(normalised.square().sum(), input)]

    net = layers()
    expected = gradients(net)
    set_mode(net, mode)
    assert_close(gradients(net), expected, 1e-12)


# ------------------------------------------------------------------------------------------------ other parameters


def doubled(net: nn.Sequential) -> dict[str, Tensor]:
    return {name: 2 * value for name, value in net.state_dict().items()}


def parametrized(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[0])
    net[0].parametrizations.weight.original0.data *= 2


REPLACED: dict[str, Callable[[nn.Sequential], Any]] = {
    "another weight": lambda net: setattr(net[0], "weight", nn.Parameter(2 * net[0].weight.detach())),
    "another bias": lambda net: setattr(net[0], "bias", nn.Parameter(net[0].bias.detach() + 1)),
    "no bias": lambda net: setattr(net[0], "bias", None),
    "an assigned state dict": lambda net: net.load_state_dict(doubled(net), assign=True),
    "another device": lambda net: net.to("meta"),
    "a parametrization": parametrized,
}
WRITTEN: dict[str, Callable[[nn.Sequential], Any]] = {
    "a loaded state dict": lambda net: net.load_state_dict(doubled(net)),
    "other data": lambda net: setattr(net[0].weight, "data", 2 * net[0].weight.data),
    "another dtype": lambda net: net.float(),
}


@MODES
@pytest.mark.parametrize("change", REPLACED)
def test_a_tap_that_is_read_after_its_parameters_were_replaced_is_evals(mode: Any, change: str) -> None:
    net = layers()
    expected = net[0](image())
    set_mode(net, mode)
    tap = net[0](image())
    net[1](tap)
    REPLACED[change](net)
    assert_close([tap + 0], [expected], 1e-12)


@MODES
@pytest.mark.parametrize("change", WRITTEN)
def test_a_tap_that_is_read_after_its_parameters_were_written_is_an_error(mode: Any, change: str) -> None:
    net = layers()
    set_mode(net, mode)
    tap = net[0](image())
    net[1](tap)
    WRITTEN[change](net)
    with pytest.raises(RuntimeError, match=TOO_LATE):
        tap.sum()


@pytest.mark.parametrize(
    "computed", [parametrizations.weight_norm, lambda conv: prune.l1_unstructured(conv, "weight", 9)]
)
@pytest.mark.parametrize("changed", [True, False])
def test_a_weight_that_is_computed_anew_for_each_read_is_the_one_that_the_call_has_read(
    computed: Callable[[nn.Module], Any], changed: bool
) -> None:
    plain, net = layers(), layers()
    set_mode(net, "tune")
    for each in (plain, net):
        computed(each[0])
    expected = plain[0](image())
    tap = net[0](image())
    net[1](tap)
    if not changed:
        assert_close([tap + 0], [expected], 1e-12)
        return
    with torch.no_grad():
        net[0].bias.mul_(2)
    with pytest.raises(RuntimeError, match=TOO_LATE):
        tap.sum()


@MODES
def test_a_tap_that_is_read_after_a_switch_is_evals(mode: Any) -> None:
    net, input = layers(), image()
    expected = net[0](input)
    for after in ("train", "eval", "tune", "deploy"):
        set_mode(net, mode)
        tap = net[0](input)
        net[1](tap)
        set_mode(net, after)  # type: ignore[arg-type]
        assert_close([tap + 0], [expected], 1e-12)


def test_a_tap_that_is_read_after_a_write_to_the_input_is_an_error() -> None:
    net, input = layers(), image()
    set_mode(net, "tune")
    tap = net[0](input)
    input.add_(1)
    with pytest.raises(RuntimeError, match=TOO_LATE):
        tap.mean()


def test_shape_and_dtype_of_a_tap_can_be_asked_for() -> None:
    net = layers()
    set_mode(net, "tune")
    tap, flat = net[0](image()), torch.ones(2 * 4 * 8 * 8)
    assert (tap.shape, tap.dim(), tap.size(1), len(tap), tap.dtype) == ((2, 4, 8, 8), 4, 4, 2, torch.float64)
    assert flat.view_as(tap).shape == flat.reshape_as(tap).shape == torch.ones(1).expand_as(tap).shape
