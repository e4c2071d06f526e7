"""Finds the convolutions and BatchNorms that may be folded, by a proof from the data flow.

A pair is folded only if it is proven that the convolution's output goes into that BatchNorm and nowhere else, and that
both are called once. There are two provers: a symbolic trace of the model, and the recording of one forward pass. For
every other BatchNorm there is a reason why it is not folded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_convbn.layers.norms import affine_of
from lightning_convbn.layers.supported_layers import FROZEN, NORM_LAYERS, conv_layer, is_norm, norm_layer
from lightning_convbn.layers.swap import class_name, plain_class, swap_of
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.data_flow import DataFlow, is_inside
from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs
from lightning_convbn.pairs.recording import record_data_flow
from lightning_convbn.pairs.tracing import trace_data_flow
from lightning_convbn.pairs.units import innermost_unit, is_compiled_unit, is_fsdp_unit

UNITS = ((is_fsdp_unit, reasons.OTHER_FSDP_UNIT), (is_compiled_unit, reasons.OTHER_COMPILED_UNIT))


def find_conv_bn_pairs(model: nn.Module, *, example_inputs: Sequence[Any] | None = None) -> ConvBNPairs:
    """Find every convolution and BatchNorm of a model that may be folded, and say why the others may not.

    The model is traced symbolically, in its present train or eval state. A trace needs no data and draws no random
    numbers, and afterwards the model is as it was. If a module can't be traced, its children are traced one by one,
    with their optional arguments at the defaults. With ``example_inputs`` one forward pass is recorded, too. It proves
    what can't be traced. Where trace and recording both see a BatchNorm, they must agree.

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
    return _proven(model, trace_data_flow(model), None)


def find_recorded_pairs(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> ConvBNPairs:
    """Find pairs by trace and recording, as `find_conv_bn_pairs` does with ``example_inputs``.

    Args:
        model: Any module, plain or converted by `set_mode`.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):  # a pass would give the parameters their shapes
        return _proven(model, trace_data_flow(model), None)
    return _proven(model, trace_data_flow(model), record_data_flow(model, inputs, kwargs))


def _proven(model: nn.Module, traced: DataFlow, recorded: DataFlow | None) -> ConvBNPairs:
    """Return the pairs that a trace proves, or, if there is a recording, trace and recording together."""
    pairs: list[ConvBNPair] = []
    unpaired: dict[str, str] = {}
    unfrozen: list[str] = []
    dims = traced.reshaped if recorded is None else {**traced.reshaped, **recorded.reshaped}
    reshaped: dict[str, int] = {}
    unfused: dict[str, str] = {}
    for name, bn in model.named_modules():
        if not is_norm(bn):
            continue
        reason = statistics_missing(bn)
        if reason is not None:
            unpaired[name] = reason
            unfrozen.append(name)
            continue
        found = _partner(model, bn, traced, recorded)
        if not isinstance(found, str):
            found = mismatch(model, traced.names[found], name) or _other_input(bn, found, recorded) or found
        if isinstance(found, str):
            unpaired[name] = found
        else:
            pairs.append(ConvBNPair(traced.names[found], name))
            why = _read_elsewhere((found, bn), traced, recorded)
            if random := [of for of in traced.drawing if is_inside(traced.names[found], of)]:
                why = reasons.RANDOM.format(name=random[0])
            if why is not None:
                unfused[name] = why
            if bn in dims:
                reshaped[name] = dims[bn]
    untraced = traced.untraced if recorded is None else ()
    return ConvBNPairs(pairs, unpaired, unfrozen, reshaped, untraced, unfused)


def _other_input(bn: nn.Module, conv: nn.Module, recorded: DataFlow | None) -> str | None:
    """Return the reason if a BatchNorm was seen with an input of dimensions for which its pair can't be folded.

    `torch.nn.BatchNorm1d` takes two or three, and its channels are the second. Those of a linear layer are the last.
    """
    row, given = conv_layer(conv), None if recorded is None else recorded.dims.get(bn)
    if row is None or recorded is None or given in (None, recorded.reshaped.get(bn, row.dims)):
        return None
    name = recorded.names[conv]
    return reasons.OTHER_INPUT.format(given=given, conv=name, conv_cls=class_name(conv), wanted=row.dims)


def _read_elsewhere(pair: Sequence[nn.Module], *provers: DataFlow | None) -> str | None:
    """Return the reason why a Deploy copy must keep a pair, if others read its parameters; None if nobody does."""
    for prover in provers:
        for module in pair:
            if prover is not None and prover.readers[module]:
                return reasons.READ_ELSEWHERE.format(name=prover.names[module], user=prover.readers[module][0])
    return None


def _partner(model: nn.Module, bn: nn.Module, traced: DataFlow, recorded: DataFlow | None) -> nn.Module | str:
    """Return the convolution in front of a BatchNorm, or the reason why there is none to be folded.

    A prover that has not seen the BatchNorm does not count. Those that have seen it must agree.
    """
    never = reasons.NEVER_CALLED.format(state="training" if model.training else "eval")
    by_trace = traced.partner(bn)
    by_record = None if recorded is None else recorded.partner(bn)
    if by_trace is None:
        if recorded is None:
            return traced.unseen.get(bn, never)
        return by_record or never
    if recorded is None or isinstance(by_trace, str) or by_trace is by_record:
        return by_trace
    otherwise = "it is never called" if by_record is None else "it is in another pair"
    return reasons.DISAGREEMENT.format(seen=by_record if isinstance(by_record, str) else otherwise)


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
        if "forward" in vars(module):
            return reasons.OWN_FORWARD.format(name=name)
    conv_row, norm_row = conv_layer(conv), norm_layer(bn)
    if conv_row is None:
        return reasons.UNKNOWN_CONVOLUTION.format(conv=conv_name, cls=class_name(conv))
    if norm_row is None:
        return reasons.UNKNOWN_NORM.format(cls=class_name(bn))
    if conv_row.dims not in norm_row.dims:
        return reasons.OTHER_DIMENSIONS.format(conv=conv_name, conv_cls=class_name(conv), cls=class_name(bn))
    if norm_row is NORM_LAYERS[FROZEN] and not _is_affine(bn):
        return reasons.UNKNOWN_NORM.format(cls=class_name(bn))
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
    if mean.is_meta or swap_of(bn) is not None:  # there are no values to compare, or they were compared already
        return True
    values = torch.linspace(-1, 1, mean.numel(), device=mean.device, dtype=mean.dtype).view(1, -1, 1, 1)
    with torch.no_grad():
        output = plain_class(bn).forward(bn, values)
        expected = F.batch_norm(values, mean, affine.running_var, affine.weight, affine.bias, False, 0.0, affine.eps)
    return torch.allclose(output, expected, rtol=1e-2, atol=1e-4)


def pairs_in_force(model: nn.Module) -> ConvBNPairs | None:
    """Return the pairs that `set_mode` has converted a model with; None for a plain model."""
    if all(swap_of(module) is None for module in model.modules()):
        return None
    names = {module: name for name, module in model.named_modules()}
    pairs: list[ConvBNPair] = []
    unpaired: dict[str, str] = {}
    unfrozen: list[str] = []
    reshaped: dict[str, int] = {}
    for module, name in names.items():
        if not is_norm(module):
            continue
        swap = swap_of(module)
        if swap is None:
            unpaired[name] = statistics_missing(module) or reasons.UNFROZEN
            unfrozen.append(name)
        elif swap.conv is None or swap.conv[0] not in names:
            unpaired[name] = swap.reason or reasons.TORN
        else:
            pairs.append(ConvBNPair(names[swap.conv[0]], name))
            if swap.reshaped:
                reshaped[name] = swap.reshaped
    return ConvBNPairs(pairs, unpaired, unfrozen, reshaped)
