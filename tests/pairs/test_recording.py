"""The second prover: pairs proven, and refused, by the recorded data flow of one forward pass."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.model_checks import assert_folded_equals_eval, randomized, recorded_pairs
from helpers.networks import images
from torch import Tensor, nn

from lightning_convbn import ConvBNPair, Mode, conv_bn_mode, find_conv_bn_pairs, get_mode, set_mode

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


class SharedConv(Net):
    def use(self, input: Tensor) -> Tensor:
        return self.bn(self.conv(input)) + self.conv(-input)


class NormTwice(Net):
    def use(self, input: Tensor) -> Tensor:
        return self.bn(self.conv(input)) + self.bn(input)


class Residual(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        return self.bn(output) + output


class ReadBefore(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        mean = output.mean()
        return self.bn(output) + mean


class InPlaceAfter(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        normalised = self.bn(output)
        return normalised * output.add_(1)


class InPlaceBefore(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        output.mul_(2)
        return self.bn(output)


class Written(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        output[:, 0] = 0
        return self.bn(output)


class AsKeyword(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        return self.bn(output) + torch.add(input, other=output)


class InList(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        return torch.cat([self.bn(output), output])


class IntoModule(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        return self.bn(output) + self.next(output)

    def __init__(self) -> None:
        super().__init__()
        self.next = nn.Conv2d(4, 4, 1)


class IntoSecondNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        return self.bn(output) + self.other(output)


class Returned(Net):
    def use(self, input: Tensor) -> dict[str, Tensor]:
        output = self.conv(input)
        return {"normalised": self.bn(output), "raw": output}


class Concatenated(Net):
    def use(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        return self.bn(torch.cat([output, output]))


class Viewed(Net):
    def use(self, input: Tensor) -> Tensor:
        return self.bn(self.conv(input).view(input.shape))


class Uncalled(Net):
    def use(self, input: Tensor) -> Tensor:
        return self.conv(input)


USED = "the output of its convolution `conv` is also used by "
NO_CONV = "its input comes from {}, not from a convolution"
REASONS = [
    (SharedConv, f"{USED}`add`"),
    (NormTwice, "is called 2 times, with inputs from different layers"),
    (Residual, f"{USED}`add`"),
    (ReadBefore, f"{USED}`mean`"),
    (InPlaceAfter, f"{USED}`add_`"),
    (InPlaceBefore, f"{USED}`mul_`"),
    (Written, f"{USED}`__setitem__`"),
    (AsKeyword, f"{USED}`add`"),
    (InList, f"{USED}`cat`"),
    (IntoModule, f"{USED}`next`"),
    (IntoSecondNorm, f"{USED}`other`"),
    (Returned, f"{USED}the caller, as it is returned"),
    (Concatenated, NO_CONV.format("`cat`")),
    (Viewed, NO_CONV.format("`view`")),
    (Uncalled, "is never called by the model's forward in its eval state"),
]


@pytest.mark.parametrize("cls", [Net, Keyword, ReadsShape, ThroughIdentity])
def test_what_does_not_trace_is_proven_by_recording(cls: type[Net]) -> None:
    model = randomized(cls().eval())
    (reason,) = find_conv_bn_pairs(model).unpaired.values()
    assert reason.startswith(f"`the model` ({cls.__name__}) can't be traced: ")
    pairs = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert [*pairs] == [PAIR]
    assert not pairs.unpaired
    assert_folded_equals_eval(model, IMAGE, pairs=pairs)


@pytest.mark.parametrize(("cls", "reason"), REASONS)
def test_a_pair_is_refused_by_recording_and_where_it_traces_by_both(cls: type[Net], reason: str) -> None:
    """The same flow without the control flow in front of it: tracing alone refuses it, too."""
    model = cls().eval()
    pairs = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert not len(pairs)
    assert pairs.unpaired["bn"] == reason
    model.forward = model.use  # type: ignore[method-assign]
    assert not len(find_conv_bn_pairs(model))
    assert recorded_pairs(model, IMAGE).unpaired["bn"] == reason
    assert not len(find_conv_bn_pairs(model, example_inputs=(IMAGE,)))


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


class Restless(Net):
    """Draws random numbers, and raises when it is told to, after it has run a part."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.dropout = nn.Dropout(0.5)

    def use(self, input: Tensor) -> Tensor:
        output = self.bn(self.conv(self.dropout(input)))
        if self.fails:
            raise RuntimeError("halfway")
        return output


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """All that a forward pass may leave behind."""
    modules = list(model.modules())
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
        [type(module) for module in modules],
        [module.training for module in modules],
        [sorted(module.__dict__) for module in modules],
        [{**module._forward_hooks, **module._forward_pre_hooks} for module in modules],
        [[id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())] for module in modules],
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        [parameter.grad for parameter in model.parameters()],
    )


@pytest.mark.parametrize(("training", "fails"), [(True, False), (False, True)])
def test_recording_leaves_everything_as_before(training: bool, fails: bool) -> None:
    torch.manual_seed(0)
    model = Restless().train(training)
    if not fails:  # a shadow has no such hook, and its forward might fail for that
        model.conv.register_forward_hook(lambda *args: None)
    model.fails = fails
    before = state_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="halfway"):
            find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    else:
        assert [*find_conv_bn_pairs(model, example_inputs=(IMAGE,))] == [PAIR]
    assert state_of(model) == before


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
@pytest.mark.parametrize("cls", [Chain, Residual, Concatenated])
def test_recording_a_converted_model(cls: type[Net], mode: Mode) -> None:
    model = cls().eval()
    found = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    with conv_bn_mode(model, mode, pairs=found):
        assert find_conv_bn_pairs(model, example_inputs=(IMAGE,)) == found
        assert recorded_pairs(model, IMAGE) == found
    if cls is Chain:
        assert [*found] == [PAIR, ConvBNPair("conv2", "bn2")]
        assert found.unpaired == {"bn3": NO_CONV.format("`bn2` (BatchNorm2d)")}


def test_recorded_pairs_go_into_force() -> None:
    model = Net().eval()
    assert not len(set_mode(model, "tune"))
    set_mode(model, "train")
    found = set_mode(model, "tune", pairs=find_conv_bn_pairs(model, example_inputs=(IMAGE,)))
    assert [*found] == [PAIR]
    assert get_mode(model) == "tune"
    assert_folded_equals_eval(model, IMAGE, pairs=found)
