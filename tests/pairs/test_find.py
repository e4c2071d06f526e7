"""What is folded and what is refused: every reason, and that a refusal leaves the output right."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.comparing import FORWARD, relative
from helpers.model_checks import recorded_pairs
from helpers.networks import Net, images, randomized
from torch import Tensor, nn

from lightning_convbn import ConvBNPair, ConvBNPairs, find_conv_bn_pairs, set_mode


def conv(channels: int = 3) -> nn.Conv2d:
    return nn.Conv2d(3, channels, 3, padding=1)


class OddConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OddBatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def shared_conv(net: Net, x: Tensor) -> Tensor:
    return net.second(net.conv(net.bn(net.conv(x))))


def norm_used_twice(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.second(net.bn(net.conv(x))))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "shared convolution": (
        lambda: Net(shared_conv, conv=conv(), bn=nn.BatchNorm2d(3), second=nn.BatchNorm2d(3)),
        {
            "bn": "the output of its convolution `conv` is also used by `second`",
            "second": "the output of its convolution `conv` is also used by `bn`",
        },
    ),
    "BatchNorm used twice": (
        lambda: Net(norm_used_twice, conv=conv(), bn=nn.BatchNorm2d(3), second=conv()),
        {"bn": "is called 2 times, with inputs from different layers"},
    ),
    "behind an activation": (
        lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(3)),
        {"2": "its input comes from `1` (ReLU), not from a convolution"},
    ),
    "first layer": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), conv()),
        {"0": "its input comes from the argument `input` of forward, not from a convolution"},
    ),
    "convolution of a class of its own": (
        lambda: nn.Sequential(OddConv2d(3, 3, 1), nn.BatchNorm2d(3)),
        {"1": "`0` is a OddConv2d, which is not in the table of supported layers"},
    ),
    "BatchNorm of a class of its own": (
        lambda: nn.Sequential(conv(), OddBatchNorm2d(3)),
        {"1": "is a OddBatchNorm2d, which is not in the table of supported layers"},
    ),
    "BatchNorm of other dimensions": (
        lambda: nn.Sequential(nn.Linear(8, 3), nn.BatchNorm2d(3)),
        {"1": "`0` (Linear) does not give a BatchNorm2d the input it wants"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_proven_is_refused_with_its_reason_and_computes_as_eval(case: str) -> None:
    build, reasons = REFUSED[case]
    model = randomized(build())
    plain = copy.deepcopy(model).eval()
    pairs = set_mode(model, "tune")
    assert (list(pairs), pairs.unpaired, pairs.unfrozen) == ([], reasons, frozenset())
    outputs, expected = model.train()(images(2, 3, 8, 8)), plain(images(2, 3, 8, 8))
    for output, other in zip(outputs, expected, strict=True):
        assert torch.equal(output, other)


ALSO = "the output of its convolution `conv` is also used by "
USES: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "added": (lambda net, y: torch.add(net.bn(y), y), f"{ALSO}`add`"),
    "by keyword": (lambda net, y: torch.add(net.bn(y), other=y), f"{ALSO}`add`"),
    "in a list": (lambda net, y: torch.cat([net.bn(y), y]), f"{ALSO}`cat`"),
    "returned": (lambda net, y: (net.bn(y), y), f"{ALSO}the caller, as it is returned"),
    "given to a module": (lambda net, y: net.bn(y) + net.relu(y), f"{ALSO}`relu`"),
    "given to its convolution": (lambda net, y: net.bn(y) + net.conv(y), f"{ALSO}`conv`"),
    "given to another BatchNorm": (lambda net, y: net.bn(y) + net.other(y), f"{ALSO}`other`"),
    "read before": (lambda net, y: y.mean() + net.bn(y), f"{ALSO}`Tensor.mean`"),
    "written before": (lambda net, y: (y.mul_(2), net.bn(y))[1], f"{ALSO}`Tensor.mul_`"),
    "written after": (lambda net, y: net.bn(y) * y.add_(1), f"{ALSO}`Tensor.add_`"),
    "written in a part": (lambda net, y: (y.__setitem__(0, 0), net.bn(y))[1], f"{ALSO}`Tensor.__setitem__`"),
    "behind a function": (
        lambda net, y: net.bn(torch.cat([y, y])),
        "its input comes from `cat`, not from a convolution",
    ),
    "behind a view": (
        lambda net, y: net.bn(y.view(y.shape)),
        "its input comes from `Tensor.view`, not from a convolution",
    ),
    "normalised twice": (lambda net, y: net.bn(y) + net.bn(-y), "is called 2 times, with inputs from different layers"),
    "not normalised": (lambda net, y: y, "is never called by the model's forward in its eval state"),
}


@pytest.mark.parametrize("case", USES)
def test_a_use_of_the_output_is_refused_by_both_provers_and_computes_as_eval(case: str) -> None:
    use, reason = USES[case]
    layers = {"conv": conv(), "bn": nn.BatchNorm2d(3), "relu": nn.ReLU(), "other": nn.BatchNorm2d(3)}
    model, image = randomized(Net(lambda net, x: use(net, net.conv(x)), **layers)).eval(), images(2, 3, 8, 8)
    plain = copy.deepcopy(model)
    pairs, recorded = set_mode(model, "tune"), recorded_pairs(plain, image)
    assert ([*pairs], pairs.unpaired["bn"]) == ([], reason)
    assert ([*recorded], recorded.unpaired["bn"]) == ([], reason.replace("`Tensor.", "`"))
    for output, other in zip(model.train()(image), plain(image), strict=True):
        assert torch.equal(output, other)


def test_a_channel_mismatch_is_refused() -> None:
    pairs = find_conv_bn_pairs(nn.Sequential(conv(4), nn.BatchNorm2d(3)))
    assert pairs.unpaired == {"1": "`0` gives 4 channels, not the 3 that it has"}


def test_a_norm_without_statistics_is_unfrozen_and_still_normalises_with_the_batch() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False))
    plain = copy.deepcopy(model)
    pairs = set_mode(model, "tune")
    assert pairs.unpaired == {"1": "has no running statistics, so it always normalises with the batch's"}
    assert pairs.unfrozen == {"1"}
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model(images(2, 3, 8, 8)), plain(images(2, 3, 8, 8)))


def test_a_lazy_norm_is_unfrozen_until_it_is_initialised() -> None:
    model = nn.Sequential(conv(), nn.LazyBatchNorm2d())
    pairs = find_conv_bn_pairs(model)
    assert pairs.unpaired == {"1": "is lazy and not initialised yet: run one batch through the model first"}
    assert pairs.unfrozen == {"1"}
    model(images(2, 3, 8, 8))
    assert list(find_conv_bn_pairs(model)) == [("0", "1")]


@pytest.mark.parametrize("read", ["x.shape[0]", "x.size(1)", "x.dim()", "x.ndim", "x.dtype == x.dtype"])
def test_reading_what_folding_leaves_unchanged_is_allowed(read: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.conv(x)
        return net.bn(x) * eval(read, {"x": x})

    assert list(find_conv_bn_pairs(Net(forward, conv=conv(), bn=nn.BatchNorm2d(3)))) == [("conv", "bn")]


def test_a_head_that_eval_never_calls_is_named_so_and_paired_in_training() -> None:
    def with_a_head(net: Net, x: Tensor) -> Tensor:
        features = net.body(x)
        return features + net.head(features) if net.training else features  # type: ignore[no-any-return]

    model = Net(with_a_head, **{name: nn.Sequential(conv(), nn.BatchNorm2d(3)) for name in ("body", "head")})
    assert list(find_conv_bn_pairs(model)) == [("body.0", "body.1"), ("head.0", "head.1")]
    pairs = find_conv_bn_pairs(model.eval())
    assert list(pairs) == [("body.0", "body.1")]
    assert pairs.unpaired == {"head.1": "is never called by the model's forward in its eval state"}


def test_children_of_what_does_not_trace_are_traced_and_the_rest_is_told_why() -> None:
    def looks_at_values(net: Net, x: Tensor) -> Tensor:
        x = net.bn(net.conv(net.block(x)))
        if x.sum() > 0:
            x = -x
        for block in net.blocks:
            x = block(x)
        return x

    layers = {"block": nn.Sequential(conv(), nn.BatchNorm2d(3)), "conv": conv(), "bn": nn.BatchNorm2d(3)}
    blocks = nn.ModuleList([nn.Sequential(conv(), nn.BatchNorm2d(3)), conv(), nn.BatchNorm2d(3)])
    model = randomized(Net(looks_at_values, **layers, blocks=blocks)).double()
    image = images(2, 3, 8, 8, dtype=torch.float64)
    plain = copy.deepcopy(model).eval()
    pairs = set_mode(model, "tune")
    why = "the model` (Net) can't be traced: symbolically traced variables cannot be used as inputs to control"
    assert list(pairs) == [("block.0", "block.1"), ("blocks.0.0", "blocks.0.1")]
    assert set(pairs.unpaired) == {"bn", "blocks.2"}
    assert all(why in reason for reason in pairs.unpaired.values())
    assert relative(model(image), plain(image)) < FORWARD


class OptionalArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(3)

    def forward(self, input: Tensor, skip: Tensor | None = None, scale: float = 1.0) -> Tensor:
        features = self.conv(input)
        if skip is not None:
            features = features + skip
        return self.bn(features) if scale == 1.0 else features * scale


def test_optional_arguments_are_traced_at_their_defaults() -> None:
    assert list(find_conv_bn_pairs(OptionalArgument())) == [("conv", "bn")]


def test_tracing_is_silent() -> None:
    def warns(net: Net, x: Tensor) -> Tensor:
        warnings.warn("called", stacklevel=1)
        return net.bn(net.conv(x))  # type: ignore[no-any-return]

    assert list(find_conv_bn_pairs(Net(warns, conv=conv(), bn=nn.BatchNorm2d(3)))) == [("conv", "bn")]


def test_one_block_under_two_names_that_is_called_once_is_paired_once() -> None:
    block = nn.Sequential(conv(), nn.BatchNorm2d(3))
    model = Net(lambda net, x: net.second(x), first=block, second=block)
    assert list(find_conv_bn_pairs(model)) == [("first.0", "first.1")]


def test_a_reason_names_the_forward_that_calls_a_function_or_a_method() -> None:
    def cast(net: Net, x: Tensor) -> Tensor:
        return net.bn(net.conv(x).to(torch.float32))

    def stacked(net: Net, x: Tensor) -> Tensor:
        return net.bn(torch.cat([net.conv(x)]))

    model = nn.Sequential(*(Net(forward, conv=conv(), bn=nn.BatchNorm2d(3)) for forward in (cast, stacked)))
    reasons = find_conv_bn_pairs(nn.Sequential(model, conv())).unpaired
    assert reasons == {
        "0.0.bn": "its input comes from `Tensor.to` in the forward of `0.0`, not from a convolution",
        "0.1.bn": "its input comes from `cat` in the forward of `0.1`, not from a convolution",
    }


def test_a_reason_found_in_a_child_names_its_modules_from_the_whole_model() -> None:
    layers = {"conv": conv(), "bn": nn.BatchNorm2d(3), "relu": nn.ReLU()}
    block = Net(lambda net, x: USES["given to a module"][0](net, net.conv(x)), **layers)
    first = Net(lambda net, x: net.bn(x), bn=nn.BatchNorm2d(3))
    model = Net(lambda net, x: net.block(net.first(x)) if x.sum() < 1e9 else x, block=block, first=first)
    assert find_conv_bn_pairs(model).unpaired == {
        "block.bn": "the output of its convolution `block.conv` is also used by `block.relu`",
        "first.bn": "its input comes from the argument `input` of the forward of `first`, not from a convolution",
    }


class TestConvBNPairs:
    PAIRS = ConvBNPairs([ConvBNPair("a", "b"), ConvBNPair("c", "d")], {"e": "why", "f": "why", "g": "other"}, ["g"])

    def test_equality_covers_reasons_and_what_is_unfrozen(self) -> None:
        pairs = self.PAIRS
        assert pairs == ConvBNPairs(list(pairs), dict(pairs.unpaired), pairs.unfrozen)
        assert pairs != ConvBNPairs(pairs[:1], pairs.unpaired, pairs.unfrozen)
        assert pairs != ConvBNPairs(pairs, {**pairs.unpaired, "e": "another reason"}, pairs.unfrozen)
        assert pairs != ConvBNPairs(pairs, pairs.unpaired)
        assert pairs != list(pairs)
        with pytest.raises(TypeError, match="unhashable"):
            hash(pairs)

    def test_unfold_freezes_and_unfreeze_does_not(self) -> None:
        unfolded = self.PAIRS.unfold({"d": "wrong", "g": "now frozen"})
        unfrozen = self.PAIRS.unfreeze({"d": "untrained"})
        assert list(unfolded) == list(unfrozen) == [("a", "b")]
        assert unfolded.frozen == {"e": "why", "f": "why", "g": "now frozen", "d": "wrong"}
        assert unfolded.unfrozen == frozenset()
        assert unfrozen.unfrozen == {"d", "g"}
        assert unfrozen.unpaired["d"] == "untrained"
        assert unfrozen.frozen == {"e": "why", "f": "why"}
        assert len(self.PAIRS) == 2

    def test_reasons_are_grouped_by_the_name_of_a_method(self) -> None:
        text = "its input comes from `Tensor.{}` in the forward of `{}`, not from a convolution"
        names = [("to", "a.b"), ("to", "c"), ("mean", "d")]
        pairs = ConvBNPairs([], {f"bn{number}": text.format(*name) for number, name in enumerate(names)})
        assert pairs.count_by_reason() == {
            "its input comes from `Tensor.to` in the forward of …, not from a convolution": 2,
            "its input comes from `Tensor.mean` in the forward of …, not from a convolution": 1,
        }

    def test_prints_a_table(self) -> None:
        assert str(self.PAIRS).splitlines() == [
            "state     BatchNorm  how or why",
            "folded    b          into a",
            "folded    d          into c",
            "frozen    e          why",
            "frozen    f          why",
            "unfrozen  g          other",
        ]

    def test_summary_groups_equal_reasons(self) -> None:
        pairs = self.PAIRS.unfold(dict.fromkeys(("h", "i"), "why"))
        assert pairs.summary() == [
            "folded         2 of 7 BatchNorms",
            "frozen         4",
            "     4 × why: e, f, h, …",
            "unfrozen       1",
            "     1 × other: g",
        ]

    def test_repr_can_be_evaluated_and_pickle_gives_an_equal_copy(self) -> None:
        assert eval(repr(self.PAIRS)) == self.PAIRS
        assert pickle.loads(pickle.dumps(self.PAIRS)) == self.PAIRS
        assert copy.deepcopy(self.PAIRS) == self.PAIRS
