"""The second prover: pairs that no tracer finds are proven by the recorded data flow of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.comparing import Snapshot
from helpers.model_checks import assert_folded_equals_eval, randomized, recorded_pairs
from helpers.networks import Net, images
from torch import Tensor, nn

from lightning_convbn import ConvBNPair, Mode, conv_bn_mode, find_conv_bn_pairs

PAIR = ConvBNPair("conv", "bn")
IMAGE = images(2, 4, 6, 6)


def untraced(use: Callable[[Net, Tensor], Any], **more: nn.Module) -> nn.Module:
    """A convolution and a BatchNorm, and a branch on a value, which no tracer gets past."""
    layers = {"conv": nn.Conv2d(4, 4, 3, padding=1), "bn": nn.BatchNorm2d(4), **more}
    return randomized(Net(lambda net, x: use(net, -x if x.sum() > 1e9 else x), **layers).eval())


def reads_shape(net: Net, x: Tensor) -> Tensor:
    output = net.conv(x)
    assert output.shape == output.size()
    assert output.dim() == output.ndim == 4
    assert output.dtype == x.dtype
    assert output.device == x.device
    return net.bn(output) + torch.zeros(6).expand_as(output) + torch.zeros(output.shape[-1])  # type: ignore[no-any-return]


PROVEN: dict[str, Callable[[Net, Tensor], Any]] = {
    "one after the other": lambda net, x: net.bn(net.conv(x)),
    "by keyword": lambda net, x: net.bn(input=net.conv(input=x)),
    "with its shape read": reads_shape,
    "through an identity": lambda net, x: net.bn(net.identity(net.conv(x))),
}


@pytest.mark.parametrize("name", PROVEN)
def test_what_does_not_trace_is_proven_by_recording(name: str) -> None:
    model = untraced(PROVEN[name], identity=nn.Identity())
    (reason,) = find_conv_bn_pairs(model).unpaired.values()
    assert reason.startswith("`the model` (Net) can't be traced: ")
    pairs = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert [*pairs] == [*recorded_pairs(model, input=IMAGE)] == [PAIR]
    assert not pairs.unpaired
    assert_folded_equals_eval(model, IMAGE, pairs=pairs)


def test_what_the_pass_shows_counts_and_not_what_a_trace_of_a_part_would_show() -> None:
    """The trace sees each block on its own; the model, which does not trace, also reaches into one of them."""

    def reaches_into_one(net: Net, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = net.skipped(x)
        return net.proven(net.reached(x)) + net.reached[0](x)  # type: ignore[no-any-return]

    names = ("reached", "skipped", "proven")
    blocks = {name: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for name in names}
    pairs = find_conv_bn_pairs(Net(reaches_into_one, **blocks).eval(), example_inputs=(IMAGE,))
    assert [*pairs] == [ConvBNPair("proven.0", "proven.1")]
    assert pairs.unpaired == {
        "reached.1": "the output of its convolution `reached.0` is also used by `add`",
        "skipped.1": "is never called by the model's forward in its eval state",
    }


def test_a_recording_that_fails_leaves_everything_as_before() -> None:
    def fails(net: Net, x: Tensor) -> Tensor:
        net.bn(net.conv(torch.nn.functional.dropout(x)))
        raise RuntimeError("halfway")

    model = untraced(fails)
    before, state = Snapshot.of(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="halfway"):
        find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert Snapshot.of(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_recording_under_gradients_keeps_no_graph() -> None:
    image = IMAGE.clone().requires_grad_()
    find_conv_bn_pairs(untraced(PROVEN["one after the other"]), example_inputs=(image,))
    assert image.grad is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_recording_a_converted_model(mode: Mode) -> None:
    """An activation works in place on what a folded BatchNorm hands through."""
    more = {"conv2": nn.Conv2d(4, 4, 1), "bn2": nn.BatchNorm2d(4), "act": nn.ReLU(inplace=True)}
    model = untraced(
        lambda net, x: net.bn3(net.bn2(net.conv2(net.act(net.bn(net.conv(x)))))), **more, bn3=nn.BatchNorm2d(4)
    )
    found = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    with conv_bn_mode(model, mode, pairs=found):
        assert find_conv_bn_pairs(model, example_inputs=(IMAGE,)) == found
        assert recorded_pairs(model, IMAGE) == found
    assert [*found] == [PAIR, ConvBNPair("conv2", "bn2")]
    assert found.unpaired == {"bn3": "its input comes from `bn2` (BatchNorm2d), not from a convolution"}
