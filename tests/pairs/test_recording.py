"""The second prover: pairs proven, and refused, by the recorded data flow of one forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.comparing import Snapshot
from helpers.model_checks import assert_folded_equals_eval, randomized, recorded_pairs
from helpers.networks import images
from torch import Tensor, nn

from lightning_convbn import ConvBNPair, Mode, conv_bn_mode, find_conv_bn_pairs

PAIR = ConvBNPair("conv", "bn")
IMAGE = images(2, 4, 6, 6)


class Net(nn.Module):
    """A convolution and a BatchNorm; a subclass says what becomes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def use(self, input: Tensor) -> Any:
        return self.bn(self.conv(input))

    def forward(self, input: Tensor) -> Any:
        if input.sum() > 1e9:  # depends on data, so that no tracer gets past it
            input = -input
        return self.use(input)


class Keyword(Net):
    def use(self, input: Tensor) -> Tensor:
        return self.bn(input=self.conv(input=input))


class ReadsShape(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        assert output.shape == output.size()
        assert output.dim() == output.ndim == 4
        assert output.dtype == input.dtype
        assert output.device == input.device
        return self.bn(output) + torch.zeros(6).expand_as(output) + torch.zeros(output.shape[-1])


class ThroughIdentity(Net):
    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()

    def use(self, input: Tensor) -> Tensor:
        return self.bn(self.identity(self.conv(input)))


@pytest.mark.parametrize("cls", [Net, Keyword, ReadsShape, ThroughIdentity])
def test_what_does_not_trace_is_proven_by_recording(cls: type[Net]) -> None:
    model = randomized(cls().eval())
    (reason,) = find_conv_bn_pairs(model).unpaired.values()
    assert reason.startswith(f"`the model` ({cls.__name__}) can't be traced: ")
    pairs = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert [*pairs] == [PAIR]
    assert not pairs.unpaired
    assert_folded_equals_eval(model, IMAGE, pairs=pairs)


def test_keyword_arguments_of_the_model() -> None:
    assert [*recorded_pairs(Net().eval(), input=IMAGE)] == [PAIR]


class Disagreeing(nn.Module):
    """The trace sees each block on its own; the model, which does not trace, also reaches into one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.skipped = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.proven = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, input: Tensor) -> Tensor:
        if input.sum() > 1e9:
            input = self.skipped(input)
        return self.proven(self.reached(input)) + self.reached[0](input)


def test_what_the_pass_shows_counts_and_not_what_a_trace_of_a_part_would_show() -> None:
    pairs = find_conv_bn_pairs(Disagreeing().eval(), example_inputs=(IMAGE,))
    assert [*pairs] == [ConvBNPair("proven.0", "proven.1")]
    assert pairs.unpaired == {
        "reached.1": "the output of its convolution `reached.0` is also used by `add`",
        "skipped.1": "is never called by the model's forward in its eval state",
    }


class Fails(Net):
    """Draws random numbers, and raises after it has run."""

    def use(self, input: Tensor) -> Tensor:
        self.bn(self.conv(torch.nn.functional.dropout(input)))
        raise RuntimeError("halfway")


def test_a_recording_that_fails_leaves_everything_as_before() -> None:
    model = Fails()
    before, state = Snapshot.of(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="halfway"):
        find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert Snapshot.of(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_recording_under_gradients_keeps_no_graph() -> None:
    image = IMAGE.clone().requires_grad_()
    find_conv_bn_pairs(Net(), example_inputs=(image,))
    assert image.grad is None
    assert torch.is_grad_enabled()


class Chain(Net):
    """Pairs with an activation between them that works in place on what a folded BatchNorm hands through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.bn3 = nn.BatchNorm2d(4)

    def use(self, input: Tensor) -> Tensor:
        return self.bn3(self.bn2(self.conv2(self.act(self.bn(self.conv(input))))))


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_recording_a_converted_model(mode: Mode) -> None:
    model = Chain().eval()
    found = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    with conv_bn_mode(model, mode, pairs=found):
        assert find_conv_bn_pairs(model, example_inputs=(IMAGE,)) == found
        assert recorded_pairs(model, IMAGE) == found
    assert [*found] == [PAIR, ConvBNPair("conv2", "bn2")]
    assert found.unpaired == {"bn3": "its input comes from `bn2` (BatchNorm2d), not from a convolution"}
