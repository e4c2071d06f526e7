"""Finds the convolutions and BatchNorms that may be folded, by a proof from the data flow.

A pair is folded only if it is proven that the convolution's output goes into that BatchNorm and nowhere else, and that
both are called once. With inputs the proof is the recording of one forward pass, without them a symbolic trace of the
model. For every other BatchNorm there is a reason why it is not folded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_convbn.compat import has_statistics
from lightning_convbn.layers.norms import affine_of
from lightning_convbn.layers.state import Frozen, Pair, Unfrozen, own_override, state_of
from lightning_convbn.layers.supported_layers import FROZEN, conv_layer, is_norm, norm_layer
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.data_flow import DataFlow, is_inside
from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs
from lightning_convbn.pairs.recording import record_data_flow
from lightning_convbn.pairs.shadow import LacksHooksError
from lightning_convbn.pairs.tracing import trace_data_flow
from lightning_convbn.pairs.units import innermost_unit, is_compiled_unit, is_fsdp_unit

UNITS = ((is_fsdp_unit, reasons.OTHER_FSDP_UNIT), (is_compiled_unit, reasons.OTHER_COMPILED_UNIT))


def find_conv_bn_pairs(model: nn.Module, *, example_inputs: Sequence[Any] | None = None) -> ConvBNPairs:
    """Find every convolution and BatchNorm of a model that may be folded, and say why the others may not.

    The model is traced symbolically, in its present train or eval state. A trace needs no data and draws no random
    numbers, and afterwards the model is as it was. If a module can't be traced, its children are traced one by one,
    with their optional arguments at the defaults. With ``example_inputs`` one forward pass is recorded in the place of
    the trace. It also proves what can't be traced.

    Args:
        model: Any module, plain or converted by `set_mode`.
        example_inputs: Positional arguments of its forward, for the recording.

    Returns:
        The pairs. ``.unpaired`` holds the reason of every other BatchNorm.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        >>> print(find_conv_bn_pairs(model))
        state   BatchNorm  how or why
        folded  1          into 0
        frozen  3          its input comes from `2` (ReLU), not from a convolution
    """
    if example_inputs is not None:
        return find_recorded_pairs(model, example_inputs, {})
    return _proven(model, trace_data_flow(model))


def find_recorded_pairs(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> ConvBNPairs:
    """Find pairs by the recording of one forward pass, as `find_conv_bn_pairs` does with ``example_inputs``.

    Args:
        model: Any module, plain or converted by `set_mode`.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):  # a pass would give the parameters their shapes
        return _proven(model, trace_data_flow(model))
    try:
        return _proven(model, record_data_flow(model, inputs, kwargs))
    except LacksHooksError:  # a trace does without the parts of a model that can't run
        return _proven(model, trace_data_flow(model))


def _proven(model: nn.Module, flow: DataFlow) -> ConvBNPairs:
    """Return the pairs that a data flow proves."""
    pairs: list[ConvBNPair] = []
    unpaired: dict[str, str] = {}
    unfrozen: list[str] = []
    unfused: dict[str, str] = {}
    for name, bn in model.named_modules():
        if is_norm(bn):
            reason = statistics_missing(bn)
        elif has_statistics(bn):
            reason = reasons.HOLDS_LAYERS
        else:
            continue
        if reason is not None:
            unpaired[name] = reason
            unfrozen.append(name)
            continue
        found = _partner(model, bn, flow)
        if not isinstance(found, str):
            found = mismatch(model, flow.names[found], name) or _other_input(bn, found, flow) or found
        if isinstance(found, str):
            unpaired[name] = found
        else:
            pairs.append(ConvBNPair(flow.names[found], name))
            why = _read_elsewhere((found, bn), flow)
            if random := [of for of in flow.drawing if is_inside(flow.names[found], of)]:
                why = reasons.RANDOM.format(name=random[0])
            if parametrize.is_parametrized(found):
                why = reasons.PARAMETRIZED.format(name=flow.names[found])
            if why is not None:
                unfused[name] = why
    return ConvBNPairs(pairs, unpaired, unfrozen, flow.untraced, unfused)


def _other_input(bn: nn.Module, conv: nn.Module, flow: DataFlow) -> str | None:
    """Return the reason if a BatchNorm was seen with an input of dimensions for which its pair can't be folded.

    `torch.nn.BatchNorm1d` takes two or three, and its channels are the second. Those of a linear layer are the last.
    """
    row, given = conv_layer(conv), flow.dims.get(bn)
    if row is None or given in (None, row.dims):
        return None
    return reasons.OTHER_INPUT.format(given=given, conv=flow.names[conv], conv_cls=type(conv).__name__, wanted=row.dims)


def _read_elsewhere(pair: Sequence[nn.Module], flow: DataFlow) -> str | None:
    """Return the reason why a Deploy copy must keep a pair, if others read its parameters; None if nobody does."""
    for module in pair:
        if flow.readers[module]:
            return reasons.READ_ELSEWHERE.format(name=flow.names[module], user=flow.readers[module][0])
    return None


def _partner(model: nn.Module, bn: nn.Module, flow: DataFlow) -> nn.Module | str:
    """Return the convolution in front of a BatchNorm, or the reason why there is none to be folded."""
    state = "training" if model.training else "eval"
    return flow.partner(bn) or flow.unseen.get(bn, reasons.NEVER_CALLED.format(state=state))


def find_untrained(model: nn.Module) -> list[str]:
    """Name the BatchNorms that were never trained: their running statistics are 0 and 1 everywhere, as when made.

    A class of BatchNorm that is always frozen does not count. It has no momentum.
    """
    return [
        name
        for name, bn in model.named_modules()
        if is_norm(bn)
        and hasattr(bn, "momentum")
        and statistics_missing(bn) is None
        and not bool(torch.count_nonzero(bn.get_buffer("running_mean")))
        and bool((bn.get_buffer("running_var") == 1).all())
    ]


def statistics_missing(bn: nn.Module) -> str | None:
    """Return the reason why a BatchNorm can't be frozen; None if it can.

    The flag ``track_running_stats`` does not tell: Lightning's ``BackboneFinetuning.freeze`` clears it although there
    are running statistics. So we look at the buffers.
    """
    if any(is_lazy(tensor) for tensor in (*bn.parameters(recurse=False), *bn.buffers(recurse=False))):
        return reasons.LAZY
    if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
        return reasons.NO_STATISTICS
    return None


def mismatch(model: nn.Module, conv_name: str, bn_name: str) -> str | None:
    """Return the reason why a convolution and a BatchNorm don't go together; None if they do.

    Args:
        model: The model that holds both.
        conv_name: Qualified name of the convolution.
        bn_name: Qualified name of the BatchNorm.
    """
    conv, bn = model.get_submodule(conv_name), model.get_submodule(bn_name)
    for is_unit, reason in UNITS:
        if innermost_unit(model, conv_name, is_unit) != innermost_unit(model, bn_name, is_unit):
            return reason.format(conv=conv_name)
    for name, module in ((conv_name, conv), (bn_name, bn)):
        method = own_override(module)
        if method is not None:
            return reasons.OWN_FORWARD.format(name=name, method=method)
    conv_row, norm_row = conv_layer(conv), norm_layer(bn)
    if conv_row is None:
        return reasons.UNKNOWN_CONVOLUTION.format(conv=conv_name, cls=type(conv).__name__)
    if norm_row is None:
        return reasons.UNKNOWN_NORM.format(cls=type(bn).__name__)
    if conv_row.dims not in norm_row.dims:
        return reasons.OTHER_DIMENSIONS.format(conv=conv_name, conv_cls=type(conv).__name__, cls=type(bn).__name__)
    if norm_row is FROZEN and not _is_affine(bn):
        return reasons.UNKNOWN_NORM.format(cls=type(bn).__name__)
    channels: int = conv.out_features if isinstance(conv, nn.Linear) else cast(nn.Conv2d, conv).out_channels
    wanted = bn.get_buffer("running_mean").numel()
    if channels != wanted:
        return reasons.OTHER_CHANNELS.format(conv=conv_name, given=channels, wanted=wanted)
    return None


def _is_affine(bn: nn.Module) -> bool:
    """Whether a ``FrozenBatchNorm2d`` computes what we read off its buffers and its epsilon.

    Several packages have a class of this name. We compare its output with what the formula gives.
    """
    affine = affine_of(bn)
    mean = affine.running_mean
    if mean.is_meta or state_of(bn) is not None:  # there are no values to compare, or they were compared already
        return True
    values = torch.linspace(-1, 1, mean.numel(), device=mean.device, dtype=mean.dtype).view(1, -1, 1, 1)
    with torch.no_grad():
        output = type(bn).forward(bn, values)
        expected = F.batch_norm(values, mean, affine.running_var, affine.weight, affine.bias, False, 0.0, affine.eps)
    return torch.allclose(output, expected, rtol=1e-2, atol=1e-4)


def pairs_in_force(model: nn.Module) -> ConvBNPairs | None:
    """Return the pairs that `set_mode` has converted a model with; None for a model in Train mode."""
    names = {module: name for name, module in model.named_modules()}
    states = {module: state_of(module) for module in names}
    if all(state is None or state.mode == "train" for state in states.values()):
        return None
    pairs: list[ConvBNPair] = []
    unpaired: dict[str, str] = {}
    unfrozen: list[str] = []
    for module, state in states.items():
        if not is_norm(module):
            continue
        if state is None or isinstance(state, Unfrozen):
            unpaired[names[module]] = statistics_missing(module) or reasons.UNFROZEN
            unfrozen.append(names[module])
        elif isinstance(state, Pair) and state.conv in names:
            pairs.append(ConvBNPair(names[state.conv], names[module]))
        else:
            unpaired[names[module]] = state.reason if isinstance(state, Frozen) else reasons.TORN
    return ConvBNPairs(pairs, unpaired, unfrozen)
