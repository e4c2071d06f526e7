"""Which convolution and BatchNorm form a pair that may be folded: the proof from data flow.

A pair is folded only when it is proven that the convolution's output goes into that BatchNorm and nowhere else, with
each of the two called once: by a symbolic trace of the model, by the recorded data flow of one forward pass, or both.
Everything else is listed with its reason.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_convbn.layers.norms import affine_of
from lightning_convbn.layers.swap import class_name, plain_class, swap_of
from lightning_convbn.layers.table import FROZEN, NORM_LAYERS, conv_layer, is_norm, norm_layer
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.data_flow import DataFlow
from lightning_convbn.pairs.fsdp import fsdp_unit
from lightning_convbn.pairs.recording import record_data_flow
from lightning_convbn.pairs.tracing import trace_data_flow


class ConvBNPair(NamedTuple):
    """A convolution and the BatchNorm that alone consumes its output, by qualified name."""

    conv: str
    bn: str


class ConvBNPairs(Sequence[ConvBNPair]):
    """The pairs of a model, in the order of its BatchNorms, and a reason for every BatchNorm in none.

    Printed, it is a table.

    Attributes:
        unpaired: Qualified name of every other BatchNorm -> why it is not folded.
        left: Those of ``unpaired`` that are not frozen either, but keep running as they are.
        flattened: BatchNorms of pairs that get a linear layer's output with all but its last dimension flattened.
        untraced: Modules that could not be traced. What their children have was proven in each child's own forward,
            not in how these modules call them.
    """

    def __init__(
        self,
        pairs: Iterable[ConvBNPair],
        unpaired: Mapping[str, str] | None = None,
        left: Iterable[str] = (),
        flattened: Iterable[str] = (),
        untraced: Iterable[str] = (),
    ) -> None:
        self._pairs = tuple(ConvBNPair(*pair) for pair in pairs)
        self.unpaired = dict(unpaired or {})
        self.left = frozenset(left)
        self.flattened = frozenset(flattened) & {pair.bn for pair in self._pairs}
        self.untraced = frozenset(untraced)

    @overload
    def __getitem__(self, index: int) -> ConvBNPair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ConvBNPair, ...]: ...
    def __getitem__(self, index: int | slice) -> ConvBNPair | tuple[ConvBNPair, ...]:
        """Return the pair at ``index``."""
        return self._pairs[index]

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self._pairs)

    def __eq__(self, other: object) -> bool:
        """Compare pairs, reasons and what is left alone."""
        if not isinstance(other, ConvBNPairs):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in ("_pairs", "unpaired", "left", "flattened"))

    __hash__ = None  # type: ignore[assignment]

    @property
    def frozen(self) -> dict[str, str]:
        """Qualified name of every BatchNorm that is frozen but not folded -> why."""
        return {bn: reason for bn, reason in self.unpaired.items() if bn not in self.left}

    def unfold(self, bns: Mapping[str, str]) -> ConvBNPairs:
        """Return these pairs without those of the BatchNorms ``bns`` (name -> reason), which stay frozen."""
        return ConvBNPairs(
            [pair for pair in self if pair.bn not in bns],
            {**self.unpaired, **bns},
            self.left - bns.keys(),
            self.flattened,
            self.untraced,
        )

    def leave(self, bns: Mapping[str, str]) -> ConvBNPairs:
        """Return these pairs without those of the BatchNorms ``bns`` (name -> reason), which are not frozen either."""
        pairs = self.unfold(bns)
        return ConvBNPairs(pairs, pairs.unpaired, self.left | bns.keys(), pairs.flattened, pairs.untraced)

    def count_by_reason(self) -> dict[str, int]:
        """Count the BatchNorms in no pair by reason, reasons that differ in qualified names only taken together."""
        return {reason: len(names) for reason, names in _grouped(self.unpaired).items()}

    def summary(self) -> list[str]:
        """Describe what happens to the BatchNorms in a few lines, those with one reason grouped."""
        total = len(self) + len(self.unpaired)
        lines = [f"folded      {len(self):>4} of {total} BatchNorms"]
        for title, bns in (
            ("frozen", self.frozen),
            ("left alone", {bn: self.unpaired[bn] for bn in self.unpaired if bn in self.left}),
        ):
            lines.append(f"{title:<11} {len(bns):>4}")
            lines += [f"  {len(names):>4} × {reason}: {_abbreviated(names)}" for reason, names in _grouped(bns).items()]
        return lines

    def __str__(self) -> str:
        """Return a table with a row per BatchNorm."""
        rows = [("folded", pair.bn, f"into {pair.conv}") for pair in self]
        rows += [("left" if bn in self.left else "frozen", bn, reason) for bn, reason in self.unpaired.items()]
        rows = [("state", "BatchNorm", "how or why"), *rows]
        state, name = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(f"{row[0]:<{state}}  {row[1]:<{name}}  {row[2]}" for row in rows)

    def __repr__(self) -> str:
        """Return the pairs, the reasons and what is left alone."""
        return f"ConvBNPairs({list(self._pairs)!r}, unpaired={self.unpaired!r}, left={sorted(self.left)!r})"


_QUALIFIED_NAME = re.compile(r"`[^`]+\.[^`]+`")


def _grouped(bns: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for bn, reason in bns.items():
        groups[_QUALIFIED_NAME.sub("…", reason)].append(bn)
    return groups


def _abbreviated(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def find_conv_bn_pairs(model: nn.Module, *, example_inputs: Sequence[Any] | None = None) -> ConvBNPairs:
    """Find every convolution and BatchNorm of a model that may be folded, and say why the others may not.

    The model is traced symbolically in the train or eval state that it is in; no data, no gradient, no randomness is
    used up and the model is left as it was, in whatever mode it is. In a module that can't be traced its children are
    traced one by one, with the default values of their optional arguments. With ``example_inputs`` the data flow of one
    forward pass is recorded as well: what can't be traced is proven by it, and where both speak they must agree.

    Args:
        model: Any module, plain or converted by `set_mode`.
        example_inputs: Positional arguments of its forward, for the recording.

    Returns:
        The pairs, with every other BatchNorm's reason in ``.unpaired``.

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
    """Find pairs as `find_conv_bn_pairs` does, with the positional and keyword arguments of one forward pass."""
    return _proven(model, trace_data_flow(model), record_data_flow(model, inputs, kwargs))


def _proven(model: nn.Module, traced: DataFlow, recorded: DataFlow | None) -> ConvBNPairs:
    pairs: list[ConvBNPair] = []
    unpaired: dict[str, str] = {}
    left: list[str] = []
    flattened: list[str] = []
    for name, bn in model.named_modules():
        if not is_norm(bn):
            continue
        reason = statistics_missing(bn)
        if reason is not None:
            unpaired[name] = reason
            left.append(name)
            continue
        found = _partner(model, bn, traced, recorded)
        if not isinstance(found, str):
            found = mismatch(model, traced.names[found], name) or found
        if isinstance(found, str):
            unpaired[name] = found
        else:
            pairs.append(ConvBNPair(traced.names[found], name))
            if bn in traced.flattened or (recorded is not None and bn in recorded.flattened):
                flattened.append(name)
    untraced = traced.untraced if recorded is None else ()
    return ConvBNPairs(pairs, unpaired, left, flattened, untraced)


def _partner(model: nn.Module, bn: nn.Module, traced: DataFlow, recorded: DataFlow | None) -> nn.Module | str:
    """Return the convolution that every prover which has seen ``bn`` finds in front of it, or the reason for none."""
    never = reasons.NEVER_CALLED.format(state="training" if model.training else "eval")
    by_trace = traced.partner(bn)
    by_record = None if recorded is None else recorded.partner(bn)
    if by_trace is None:
        if recorded is None:
            return traced.unseen.get(bn, never)
        return by_record or never
    if recorded is None or isinstance(by_trace, str) or by_trace is by_record:
        return by_trace
    seen = by_record if isinstance(by_record, str) else "is never called" if by_record is None else "is another pair"
    return reasons.DISAGREEMENT.format(seen=seen)


def find_untrained(model: nn.Module) -> list[str]:
    """Name the BatchNorms whose running statistics are still the initial ones: mean 0 and variance 1 everywhere."""
    return [
        name
        for name, bn in model.named_modules()
        if isinstance(bn, _BatchNorm)
        and statistics_missing(bn) is None
        and not bool(torch.count_nonzero(bn.get_buffer("running_mean")))
        and bool((bn.get_buffer("running_var") == 1).all())
    ]


def find_hooked(model: nn.Module, pairs: ConvBNPairs) -> list[str]:
    """Name the modules of pairs with hooks that see other tensors in Tune and Deploy mode than in Eval mode.

    A folded convolution puts out what is normalised already, and its BatchNorm passes that on.
    """
    convs = [pair.conv for pair in pairs if model.get_submodule(pair.conv)._forward_hooks]
    bns = [model.get_submodule(pair.bn) for pair in pairs]
    return convs + [pair.bn for pair, bn in zip(pairs, bns, strict=True) if bn._forward_hooks or bn._forward_pre_hooks]


def statistics_missing(bn: nn.Module) -> str | None:
    """Say why a BatchNorm can't be frozen; None if it can.

    It goes by the buffers: Lightning's ``BackboneFinetuning.freeze`` clears the flag ``track_running_stats`` of
    BatchNorms that have them.
    """
    if any(is_lazy(tensor) for tensor in (*bn.parameters(recurse=False), *bn.buffers(recurse=False))):
        return reasons.LAZY
    if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
        return reasons.NO_STATISTICS
    return None


def mismatch(model: nn.Module, conv_name: str, bn_name: str) -> str | None:
    """Say why a convolution and a BatchNorm of a model can't be folded whatever the data flow; None if they can."""
    conv, bn = model.get_submodule(conv_name), model.get_submodule(bn_name)
    if fsdp_unit(model, conv_name) != fsdp_unit(model, bn_name):
        return reasons.OTHER_FSDP_UNIT.format(conv=conv_name)
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
    """Whether a ``FrozenBatchNorm2d`` of whatever package computes what its buffers say, with the epsilon we take."""
    affine = affine_of(bn)
    mean = affine.running_mean
    if mean.is_meta or swap_of(bn) is not None:  # no values to compare, or compared before it was converted
        return True
    values = torch.linspace(-1, 1, mean.numel(), device=mean.device, dtype=mean.dtype).view(1, -1, 1, 1)
    with torch.no_grad():
        output = plain_class(bn).forward(bn, values)
        expected = F.batch_norm(values, mean, affine.running_var, affine.weight, affine.bias, False, 0.0, affine.eps)
    return torch.allclose(output, expected, rtol=1e-2, atol=1e-4)


def pairs_in_force(model: nn.Module) -> ConvBNPairs | None:
    """Read the pairs back from a model that `set_mode` has converted; None for a plain one."""
    if all(swap_of(module) is None for module in model.modules()):
        return None
    names = {module: name for name, module in model.named_modules()}
    pairs: list[ConvBNPair] = []
    unpaired: dict[str, str] = {}
    left: list[str] = []
    flattened: list[str] = []
    for module, name in names.items():
        if not is_norm(module):
            continue
        swap = swap_of(module)
        if swap is None:
            unpaired[name] = statistics_missing(module) or reasons.LEFT_ALONE
            left.append(name)
        elif swap.conv is None or swap.conv[0] not in names:
            unpaired[name] = swap.reason
        else:
            pairs.append(ConvBNPair(names[swap.conv[0]], name))
            if swap.flattened:
                flattened.append(name)
    return ConvBNPairs(pairs, unpaired, left, flattened)
