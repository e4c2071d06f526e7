"""Which convolution and BatchNorm form a pair that may be folded: the proof from data flow.

A pair is folded only when a symbolic trace of the model shows the convolution's output going into that BatchNorm and
nowhere else, with each of the two called once. Everything else is listed with its reason. What does not trace as a
whole (control flow, say) is traced child by child.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, cast, overload

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lightning_convbn.layers import conv_layer, is_norm, norm_layer, plain_class, swap_of

NO_STATISTICS = "has no running statistics, so it always normalises with the batch's"
UNTRAINED = "was never trained (mean 0, variance 1)"
LEFT_ALONE = "was left alone when the model was converted"


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
    """

    def __init__(
        self, pairs: Iterable[ConvBNPair], unpaired: Mapping[str, str] | None = None, left: Iterable[str] = ()
    ) -> None:
        self._pairs = tuple(ConvBNPair(*pair) for pair in pairs)
        self.unpaired = dict(unpaired or {})
        self.left = frozenset(left)

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
        return (self._pairs, self.unpaired, self.left) == (other._pairs, other.unpaired, other.left)

    __hash__ = None  # type: ignore[assignment]

    @property
    def frozen(self) -> dict[str, str]:
        """Qualified name of every BatchNorm that is frozen but not folded -> why."""
        return {bn: reason for bn, reason in self.unpaired.items() if bn not in self.left}

    def unfold(self, bns: Mapping[str, str]) -> ConvBNPairs:
        """Return these pairs without those of the BatchNorms ``bns`` (name -> reason), which stay frozen."""
        return ConvBNPairs(
            [pair for pair in self if pair.bn not in bns], {**self.unpaired, **bns}, self.left - bns.keys()
        )

    def leave(self, bns: Mapping[str, str]) -> ConvBNPairs:
        """Return these pairs without those of the BatchNorms ``bns`` (name -> reason), which are not frozen either."""
        pairs = self.unfold(bns)
        return ConvBNPairs(pairs, pairs.unpaired, self.left | bns.keys())

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


def _grouped(bns: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for bn, reason in bns.items():
        groups[reason].append(bn)
    return groups


def _abbreviated(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def find_conv_bn_pairs(model: nn.Module) -> ConvBNPairs:
    """Find every convolution and BatchNorm of a model that may be folded, and say why the others may not.

    The model is traced symbolically in the train or eval state that it is in; no data, no gradient, no randomness is
    used up and the model is left as it was, in whatever mode it is. In a module that can't be traced its children are
    traced one by one, with the default values of their optional arguments.

    Args:
        model: Any module, plain or converted by `set_mode`.

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
    flow = _DataFlow(model)
    pairs: list[ConvBNPair] = []
    unpaired: dict[str, str] = {}
    left: list[str] = []
    for name, bn in model.named_modules():
        if not is_norm(bn):
            continue
        reason = statistics_missing(bn)
        if reason is not None:
            unpaired[name] = reason
            left.append(name)
            continue
        found = flow.partner(bn)
        if isinstance(found, str):
            unpaired[name] = found
        else:
            pairs.append(ConvBNPair(flow.names[found], name))
    return ConvBNPairs(pairs, unpaired, left)


def find_untrained(model: nn.Module) -> list[str]:
    """Name the BatchNorms whose running statistics are still the initial ones: mean 0 and variance 1 everywhere."""
    return [
        name
        for name, bn in model.named_modules()
        if is_norm(bn)
        and statistics_missing(bn) is None
        and not bool(torch.count_nonzero(bn.get_buffer("running_mean")))
        and bool((bn.get_buffer("running_var") == 1).all())
    ]


def statistics_missing(bn: nn.Module) -> str | None:
    """Say why a BatchNorm can't be frozen; None if it can.

    It goes by the buffers: Lightning's ``BackboneFinetuning.freeze`` clears the flag ``track_running_stats`` of
    BatchNorms that have them.
    """
    if any(is_lazy(tensor) for tensor in (*bn.parameters(recurse=False), *bn.buffers(recurse=False))):
        return "is lazy and not initialised yet: run one batch through the model first"
    if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
        return NO_STATISTICS
    return None


def mismatch(conv: nn.Module, bn: nn.Module, conv_name: str) -> str | None:
    """Say why two modules can't be folded whatever the data flow; None if they can."""
    conv_row, norm_row = conv_layer(conv), norm_layer(bn)
    if conv_row is None:
        return f"`{conv_name}` is a {_class_name(conv)}, which is not in the table of supported layers"
    if norm_row is None:
        return f"is a {_class_name(bn)}, which is not in the table of supported layers"
    if conv_row.dims not in norm_row.dims:
        return f"`{conv_name}` ({_class_name(conv)}) does not give a {_class_name(bn)} the input it wants"
    channels: int = conv.out_features if isinstance(conv, nn.Linear) else cast(nn.Conv2d, conv).out_channels
    if channels != bn.get_buffer("running_mean").numel():
        return f"`{conv_name}` gives {channels} channels, not the {bn.get_buffer('running_mean').numel()} that it has"
    return None


def _class_name(module: nn.Module) -> str:
    return plain_class(module).__name__


class _Tracer(fx.Tracer):
    """Symbolic tracing that stops at every convolution and BatchNorm, of whatever subclass."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = is_norm(m) or isinstance(m, (_ConvNd, nn.Linear)) or conv_layer(m) is not None
        return leaf or super().is_leaf_module(m, module_qualified_name)


@dataclass
class _Call:
    """One call of a module in a traced region."""

    region: nn.Module
    node: fx.Node


@dataclass
class _DataFlow:
    """Every call of a model's convolutions and BatchNorms, and what could not be traced."""

    model: nn.Module
    names: dict[nn.Module, str] = field(init=False)
    calls: dict[nn.Module, list[_Call]] = field(init=False)
    untraced: dict[nn.Module, str] = field(init=False)  # a module -> why the nearest module around it does not trace

    def __post_init__(self) -> None:
        self.names = {module: name for name, module in self.model.named_modules()}
        self.calls = defaultdict(list)
        self.untraced = {}
        with _left_as_found(self.model):
            self._trace(self.model, "")

    def _trace(self, module: nn.Module, why: str) -> None:
        if is_norm(module):
            self.untraced.setdefault(module, why)
            return
        if not any(is_norm(child) for child in module.modules()):
            return
        try:
            graph = _Tracer(param_shapes_constant=True).trace(module, _defaults(module))
        except Exception as error:  # a user's forward may raise anything when it is given proxies
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                name = self.names[module] or "the model"
                why = f"`{name}` ({_class_name(module)}) can't be traced: {_first_line(error)}"
            for child in module.children():
                self._trace(child, why)
            return
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls[module.get_submodule(str(node.target))].append(_Call(module, node))

    def partner(self, bn: nn.Module) -> nn.Module | str:
        """Return the convolution that ``bn`` may be folded into, or the reason why there is none."""
        calls = self.calls[bn]
        if not calls:
            state = "training" if self.model.training else "eval"
            return self.untraced.get(bn) or f"is never called by the model's forward in its {state} state"
        if len(calls) > 1:
            return f"is called {len(calls)} times"
        region, node = calls[0].region, calls[0].node
        source = node.all_input_nodes[0]
        if source.op != "call_module":
            return f"its input comes from {_described(source)}, not from a convolution"
        conv = region.get_submodule(str(source.target))
        name = self.names[conv]
        if conv_layer(conv) is None and not isinstance(conv, (_ConvNd, nn.Linear)):
            return f"its input comes from `{name}` ({_class_name(conv)}), not from a convolution"
        if len(self.calls[conv]) > 1:
            return f"its convolution `{name}` is called {len(self.calls[conv])} times"
        others = [user for user in source.users if user is not node and _reads_values(user)]
        if others:
            return f"the output of its convolution `{name}` is also used by {_described(others[0])}"
        return mismatch(conv, bn, name) or conv


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Undo what a traced forward does on the way: attributes it sets, random numbers it draws, warnings it gives."""
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    state = random.getstate()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)
        for module, found in attributes:
            module.__dict__.clear()
            module.__dict__.update(found)


def _defaults(module: nn.Module) -> dict[str, object]:
    """Trace with optional arguments at their defaults: a proxy in their place would choose other branches."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _reads_values(node: fx.Node) -> bool:
    """Whether a consumer reads more of a tensor than folding leaves unchanged: its shape, dtype and device."""
    if node.op == "call_method":
        return node.target not in ("size", "dim", "ndimension")
    return not (node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA)


_METADATA = ("shape", "ndim", "dtype", "device")


def _described(node: fx.Node) -> str:
    match node.op:
        case "placeholder":
            return f"the argument `{node.target}` of forward"
        case "output":
            return "the caller, as it is returned"
        case "get_attr":
            return f"the attribute `{node.target}`"
        case "call_function":
            return f"`{getattr(node.target, '__name__', node.target)}`"
        case _:
            return f"`{node.target}`"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pairs_in_force(model: nn.Module) -> ConvBNPairs | None:
    """Read the pairs back from a model that `set_mode` has converted; None for a plain one."""
    if all(swap_of(module) is None for module in model.modules()):
        return None
    names = {module: name for name, module in model.named_modules()}
    pairs: list[ConvBNPair] = []
    unpaired: dict[str, str] = {}
    left: list[str] = []
    for module, name in names.items():
        if not is_norm(module):
            continue
        swap = swap_of(module)
        if swap is None:
            unpaired[name] = statistics_missing(module) or LEFT_ALONE
            left.append(name)
        elif swap.conv is None or swap.conv[0] not in names:
            unpaired[name] = swap.reason
        else:
            pairs.append(ConvBNPair(names[swap.conv[0]], name))
    return ConvBNPairs(pairs, unpaired, left)
