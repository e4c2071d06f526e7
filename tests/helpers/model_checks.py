"""Checks of a whole model: what becomes of its BatchNorms, by both provers, and that folding changes no output."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

from helpers.comparing import FORWARD, assert_close, floats, in_float64, outputs
from lightning_convbn import ConvBNPairs, find_conv_bn_pairs, fuse_for_deploy
from lightning_convbn.layers.supported_layers import is_norm
from lightning_convbn.pairs.find import _proven
from lightning_convbn.pairs.recording import record_data_flow


class Counts(NamedTuple):
    """What becomes of the BatchNorms of a model."""

    folded: int
    frozen: int
    unfrozen: int = 0

    @classmethod
    def of(cls, pairs: ConvBNPairs) -> Counts:
        return cls(len(pairs), len(pairs.frozen), len(pairs.unfrozen))


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Every BatchNorm of a model, of whatever class, by qualified name."""
    return {name: module for name, module in model.named_modules() if is_norm(module)}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm, frozen ones included, statistics and an affine map that training might leave behind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in norms(model).values():
            tensors = {**module._parameters, **module._buffers}
            for name, low, high in (("running_var", 0.5, 2.0), ("weight", 0.7, 1.3)):
                if (tensor := tensors.get(name)) is not None:
                    tensor.uniform_(low, high, generator=generator)
            for name in ("running_mean", "bias"):
                if (tensor := tensors.get(name)) is not None:
                    tensor.normal_(0, 0.2, generator=generator)
    return model


def recorded_pairs(model: nn.Module, *inputs: Any, **kwargs: Any) -> ConvBNPairs:
    """What the recording of one forward pass proves, tracing left out."""
    flow = record_data_flow(model, inputs, kwargs)
    return _proven(model, flow)


def assert_provers_agree(model: nn.Module, *inputs: Any, untraced: int | None = 0) -> ConvBNPairs:
    """Find a model's pairs by tracing and by recording: no pair of one may be missing from the other.

    A pair that tracing finds and the data flow of a real pass contradicts, a false pair, fails; so does a missed one,
    unless its BatchNorm is in a region that can't be traced. There both provers together must find it.

    Args:
        model: Any plain module.
        inputs: Positional arguments of its forward.
        untraced: How many pairs only the recording can prove; None for any number.
    """
    traced, recorded = find_conv_bn_pairs(model), recorded_pairs(model, *inputs)
    assert not {*traced} - {*recorded}, {pair: recorded.unpaired.get(pair.bn) for pair in {*traced} - {*recorded}}
    missed = {pair: traced.unpaired[pair.bn] for pair in recorded if pair not in traced}
    assert untraced is None or len(missed) == untraced, missed
    assert all("can't be traced" in reason for reason in missed.values()), missed
    both = find_conv_bn_pairs(model, example_inputs=inputs) if missed else traced
    assert list(both) == list(recorded)
    assert sorted([*(pair.bn for pair in both), *both.unpaired]) == sorted(norms(model))
    return both


def assert_folded_equals_eval(model: nn.Module, *inputs: Any, pairs: ConvBNPairs | None = None) -> None:
    """Compare Tune mode, Deploy mode and the Deploy copy with Eval mode, all in float64. The copy has plain layers."""
    model, inputs = copy.deepcopy(model).double(), tree_map(in_float64, inputs)
    pairs = find_conv_bn_pairs(model) if pairs is None else pairs
    expected = outputs(model, "eval", *inputs, pairs=pairs)
    assert expected
    for mode in ("tune", "deploy"):
        assert_close(outputs(model, mode, *inputs, pairs=pairs), expected, FORWARD)
    fused = fuse_for_deploy(model, pairs=pairs, example_inputs=inputs if pairs.untraced else None)
    with torch.no_grad():
        assert_close(floats(fused(*inputs)), expected, FORWARD)
    assert sorted(norms(fused)) == sorted([*pairs.unpaired, *pairs.unfused])
    assert not any(type(module).__module__.startswith("lightning_convbn") for module in fused.modules())
