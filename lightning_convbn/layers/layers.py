"""The classes that a convolution or a BatchNorm is swapped to, and the table of supported layers.

A swap assigns ``module.__class__`` and touches nothing else: parameters, buffers, ``state_dict`` keys and hooks stay.
Every class stands at module level, so a converted model can be pickled and copied. A converted module carries `Swap`,
what must be known to undo it, and a folded convolution also its partner, in a plain tuple that follows a deepcopy
without becoming a submodule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from lightning_convbn.ops.fold import (
    Constants,
    ConvSpec,
    compute_dtype,
    constants_of,
    conv_bn,
    fold_conv_bn,
    fold_dtype,
    folded_conv,
    is_watched,
    layout,
)

Mode = Literal["train", "eval", "tune", "deploy"]
Row = TypeVar("Row")
Value = TypeVar("Value")

_VERSION = attrgetter("_version")
KEPT = ("_constants", "_folded")  # attributes of a folded convolution that can be computed anew at any time


class Swap(NamedTuple):
    """How a converted module was found, and what it is now."""

    plain: type[nn.Module]
    training: bool
    mode: Mode
    conv: tuple[nn.Module] | None = None  # of a BatchNorm: the convolution that it is paired with
    flattened: bool = False  # of a pair: whether BatchNorm gets the flattened rows of a linear layer's output
    reason: str = ""  # of a BatchNorm without a pair: why


class Affine(NamedTuple):
    """The tensors of a frozen BatchNorm, each ``(C,)``; ``weight`` and ``bias`` may be None."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float


def affine_of(bn: nn.Module) -> Affine:
    """Read the affine map of a BatchNorm with running statistics.

    DETR-like models in transformers have a FrozenBatchNorm2d that writes its epsilon, 1e-5, into its forward.
    """
    norm: Any = bn
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    return Affine(norm.weight, norm.bias, mean, var, getattr(norm, "eps", 1e-5))


def operands_of(conv: nn.Module, bn: nn.Module) -> tuple[Any, Any, Any, Any, Any, Any, float]:
    """Weight and bias of a convolution, and what `affine_of` reads of its BatchNorm.

    An attribute that is a parameter or a buffer takes a Python function, and between two convolutions that shows in the
    time of a step. So they are read from where modules hold them, if they are there.
    """
    held, parameters, buffers = conv._parameters, bn._parameters, bn._buffers
    if "weight" in held and "bias" in held and "weight" in parameters and "bias" in parameters:
        mean, var = buffers.get("running_mean"), buffers.get("running_var")
        if mean is not None and var is not None:
            eps: float = getattr(bn, "eps", 1e-5)
            return held["weight"], held["bias"], parameters["weight"], parameters["bias"], mean, var, eps
    return conv.weight, conv.bias, *affine_of(bn)  # type: ignore[return-value]


class Kept(Generic[Value]):
    """What was computed from tensors whose writes are counted, and by what it is known that they are as they were.

    Args:
        compute: Computes it, free of gradients.
        sources: The tensors.
        facts: What else it was computed from.
    """

    def __init__(self, compute: Callable[[], Value], sources: tuple[Tensor, ...], facts: tuple[Any, ...]) -> None:
        self._sources = sources
        # Holds their storages, whose addresses would otherwise be given to others and say nothing.
        self._storages = [tensor.detach() for tensor in sources]
        self._state = (*facts, *map(_VERSION, sources), *map(Tensor.data_ptr, sources))
        with torch.inference_mode(False), torch.no_grad():  # it may be wanted outside of inference mode, too
            self.value = compute()

    def is_of(self, sources: tuple[Tensor, ...], facts: tuple[Any, ...]) -> bool:
        """Whether it is what these give, and nobody has written them since."""
        if len(sources) != len(self._sources) or not all(map(is_, self._sources, sources)):
            return False
        return self._state == (*facts, *map(_VERSION, sources), *map(Tensor.data_ptr, sources))


class ConvBNLayer(nn.Module):
    """Base of the convolutions that apply the BatchNorm behind them, too.

    A subclass is made of this class's `Tune` or `Deploy`, a geometry, and the plain layer, in this order.
    """

    weight: Tensor
    bias: Any  # a parameter, or None
    _bn: tuple[nn.Module]
    _constants: Kept[Constants] | None = None
    _folded: Kept[tuple[Tensor, Tensor]] | None = None
    _owns_weight: bool = False  # whether the weight is the module's own between two calls, and not sharded, say
    _rows: bool = False  # whether BatchNorm gets the output with its first two dimensions flattened
    dims: int  # dimensions of a batched input; any other input runs unfolded

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Return the input with explicit padding where the convolution can't pad itself, and the geometry."""
        raise TypeError(f"{type(self).__name__} needs a geometry")

    def plain_forward(self, input: Tensor, output_size: Sequence[int] | None) -> Tensor:
        """Run the layer as it was found."""
        arguments = () if output_size is None else (output_size,)
        output: Tensor = plain_class(self).forward(self, input, *arguments)
        return output

    def is_constant(self, sources: Iterable[Tensor]) -> bool:
        """Whether the fold of ``sources`` holds until one of them changes."""
        raise TypeError(f"{type(self).__name__} must be a Tune or a Deploy class")

    def constants(
        self, weight: Tensor, gamma: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Constants | None:
        """What is constant in the fold, kept from call to call; None where it can't outlive one."""
        if not _may_keep() or type(mean) is not Tensor or mean.requires_grad or var.requires_grad:
            return None
        scale = None if gamma is None or gamma.requires_grad else gamma
        sources = (mean, var) if scale is None else (mean, var, scale)
        kept, facts = self._constants, (eps, weight.dtype)
        if kept is None or not kept.is_of(sources, facts):
            if _any_unversioned(sources):
                return None
            kept = Kept(partial(constants_of, mean, var, scale, eps, fold_dtype(weight)), sources, facts)
            if type(kept.value.rstd) is Tensor:
                self._constants = kept
        return kept.value

    def warm_up(self) -> None:
        """Compute what stays from call to call."""
        weight, _, gamma, _, mean, var, eps = operands_of(self, self._bn[0])
        self.constants(weight, gamma, mean, var, eps)

    def folded_forward(self, input: Tensor, spec: ConvSpec | None) -> Tensor:
        """Run the folded pair: with a kept fold where that is constant, or in one differentiable step."""
        operands = weight, _, gamma, _, mean, var, eps = operands_of(self, self._bn[0])
        if not (weight.requires_grad and torch.is_grad_enabled()):  # as it mostly is, and then there is no more to ask
            sources = tuple(tensor for tensor in operands[:6] if tensor is not None)
            if self.is_constant(sources) and self._may_keep_fold(input, sources):
                return folded_conv(input, *self.fold(compute_dtype(input, weight), operands, sources, spec), spec)
        if self._folded is not None:
            del self._folded
        return conv_bn(input, *operands, spec, self.constants(weight, gamma, mean, var, eps))

    def fold(
        self, dtype: torch.dtype, operands: tuple[Any, ...], sources: tuple[Tensor, ...], spec: ConvSpec | None
    ) -> tuple[Tensor, Tensor]:
        """Folded weight and bias, kept from call to call."""
        kept, facts = self._folded, (dtype, sources[0].device, *(operand is None for operand in operands), operands[-1])
        if kept is None or not kept.is_of(sources, facts):
            transposed, groups = layout(spec)
            fold = partial(fold_conv_bn, *operands, transposed=transposed, groups=groups, dtype=dtype)
            kept = self._folded = Kept(fold, sources, facts)
        return kept.value

    def _may_keep_fold(self, input: Tensor, sources: Iterable[Tensor]) -> bool:
        """Whether a fold may outlive the call, and every write to what is folded would be noticed."""
        own = self._owns_weight and type(self.weight) is nn.Parameter and not isinstance(input, FakeTensor)
        return own and _may_keep() and not _any_unversioned(sources)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the normalised output of the pair."""
        if input.dim() != self.dims:
            if self._rows and input.dim() == self.dims + 1:
                rows = self.folded_forward(*self.geometry(input.flatten(0, 1), None))
                return rows.unflatten(0, input.shape[:2])
            return frozen_batch_norm(self._bn[0], self.plain_forward(input, output_size))
        return self.folded_forward(*self.geometry(input, output_size))

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is kept out of copies and files."""
        return {name: value for name, value in self.__dict__.items() if name not in KEPT}


class Tune(ConvBNLayer):
    """Folds at every forward where a parameter of the pair is trainable; gradients reach every one of them."""

    def is_constant(self, sources: Iterable[Tensor]) -> bool:
        """Whether nothing that is folded wants a gradient."""
        return not _any_trainable(sources)


class Deploy(ConvBNLayer):
    """Folds once. The fold holds no gradient, so where a parameter wants one this runs as `Tune` does."""

    def is_constant(self, sources: Iterable[Tensor]) -> bool:
        """Whether nothing that is folded wants a gradient, or none is taken."""
        return not torch.is_grad_enabled() or not _any_trainable(sources)


def _any_trainable(tensors: Iterable[Tensor]) -> bool:
    for tensor in tensors:  # noqa: SIM110 - a generator takes longer, for every pair in every step
        if tensor.requires_grad:
            return True
    return False


def _any_unversioned(tensors: Iterable[Tensor]) -> bool:
    """Whether writes to a tensor leave no trace, because it was made in inference mode or has no data."""
    return any(tensor.is_inference() or isinstance(tensor, FakeTensor) for tensor in tensors)


def _may_keep() -> bool:
    """Whether what is computed may outlive the call: not in a transform, nor in a graph, say (pytorch #108863)."""
    return not is_watched() and peek_interpreter_stack() is None


class ConvGeometry(ConvBNLayer):
    """Geometry of an ordinary convolution, all padding modes."""

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Pad where ``torch.convolution`` can't: other modes than zeros, and an uneven ``padding="same"``."""
        conv: Any = self
        zeros = (0,) * len(conv.stride)
        padding = conv.padding
        if conv.padding_mode != "zeros":
            input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = zeros
        elif padding == "valid":
            padding = zeros
        elif padding == "same":
            before = conv._reversed_padding_repeated_twice[-2::-2]
            after = conv._reversed_padding_repeated_twice[-1::-2]
            if before != after:
                uneven = [(0, right - left) for left, right in zip(before, after, strict=True)]
                input = F.pad(input, [size for pair in reversed(uneven) for size in pair])
            padding = tuple(before)
        return input, ConvSpec(conv.stride, padding, conv.dilation, False, zeros, conv.groups)


class ConvTransposeGeometry(ConvBNLayer):
    """Geometry of a transposed convolution."""

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Resolve ``output_size`` into the output padding."""
        conv = cast(nn.ConvTranspose2d, self)
        output_padding = tuple(
            conv._output_padding(
                input,
                None if output_size is None else list(output_size),
                list(conv.stride),
                cast("list[int]", list(conv.padding)),
                list(conv.kernel_size),
                len(conv.stride),
                list(conv.dilation),
            )
        )
        padding = cast("tuple[int, ...]", conv.padding)
        return input, ConvSpec(conv.stride, padding, conv.dilation, True, output_padding, conv.groups)


class LinearGeometry(ConvBNLayer):
    """A linear layer has none."""

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Return the input as it is."""
        return input, None


class TuneConv1d(Tune, ConvGeometry, nn.Conv1d):
    """`torch.nn.Conv1d` with its BatchNorm folded on the fly."""

    dims = 3


class TuneConv2d(Tune, ConvGeometry, nn.Conv2d):
    """`torch.nn.Conv2d` with its BatchNorm folded on the fly."""

    dims = 4


class TuneConv3d(Tune, ConvGeometry, nn.Conv3d):
    """`torch.nn.Conv3d` with its BatchNorm folded on the fly."""

    dims = 5


class TuneConvTranspose1d(Tune, ConvTransposeGeometry, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with its BatchNorm folded on the fly."""

    dims = 3


class TuneConvTranspose2d(Tune, ConvTransposeGeometry, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with its BatchNorm folded on the fly."""

    dims = 4


class TuneConvTranspose3d(Tune, ConvTransposeGeometry, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with its BatchNorm folded on the fly."""

    dims = 5


class TuneLinear(Tune, LinearGeometry, nn.Linear):
    """`torch.nn.Linear` with its BatchNorm1d folded on the fly."""

    dims = 2


class DeployConv1d(Deploy, ConvGeometry, nn.Conv1d):
    """`torch.nn.Conv1d` with its BatchNorm folded once."""

    dims = 3


class DeployConv2d(Deploy, ConvGeometry, nn.Conv2d):
    """`torch.nn.Conv2d` with its BatchNorm folded once."""

    dims = 4


class DeployConv3d(Deploy, ConvGeometry, nn.Conv3d):
    """`torch.nn.Conv3d` with its BatchNorm folded once."""

    dims = 5


class DeployConvTranspose1d(Deploy, ConvTransposeGeometry, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with its BatchNorm folded once."""

    dims = 3


class DeployConvTranspose2d(Deploy, ConvTransposeGeometry, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with its BatchNorm folded once."""

    dims = 4


class DeployConvTranspose3d(Deploy, ConvTransposeGeometry, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with its BatchNorm folded once."""

    dims = 5


class DeployLinear(Deploy, LinearGeometry, nn.Linear):
    """`torch.nn.Linear` with its BatchNorm1d folded once."""

    dims = 2


def frozen_batch_norm(bn: nn.Module, input: Tensor) -> Tensor:
    """Normalise with the running statistics, whatever the module's training flag says."""
    check = getattr(bn, "_check_input_dim", None)
    if check is not None:
        check(input)
    weight, bias, mean, var, eps = affine_of(bn)
    return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)


class EvalNorm(nn.Module):
    """A BatchNorm frozen at its running statistics for good."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; the training flag is not read and no buffer is written."""
        return frozen_batch_norm(self, input)


class FoldedNorm(nn.Module):
    """A BatchNorm whose work the convolution in front of it does."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, which is normalised already."""
        return input


class EvalBatchNorm1d(EvalNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, frozen."""


class EvalBatchNorm2d(EvalNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, frozen."""


class EvalBatchNorm3d(EvalNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, frozen."""


class EvalSyncBatchNorm(EvalNorm, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, frozen: nothing is left to synchronise."""


class FoldedBatchNorm1d(FoldedNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, folded into its convolution."""


class FoldedBatchNorm2d(FoldedNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, folded into its convolution."""


class FoldedBatchNorm3d(FoldedNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, folded into its convolution."""


class FoldedSyncBatchNorm(FoldedNorm, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, folded into its convolution."""


@dataclass(frozen=True)
class ConvLayer:
    """A row of the table: what a plain convolution becomes."""

    tune: type[Tune]
    deploy: type[Deploy]

    @property
    def dims(self) -> int:
        """Dimensions of a batched input."""
        return self.tune.dims


@dataclass(frozen=True)
class NormLayer:
    """A row of the table: what a plain BatchNorm becomes, and the dimensions its input may have.

    ``eval`` is None for a BatchNorm that is always frozen: it stays what it is. ``runs_after`` names those children of
    the BatchNorm that run on what is normalised, in their order.
    """

    eval: type[EvalNorm] | None
    folded: type[FoldedNorm]
    dims: frozenset[int]
    runs_after: tuple[str, ...] = ()


FROZEN = "FrozenBatchNorm2d"  # the row of every class of this name

# Keys are exact classes, or their qualified names where importing a package just to name its class would be too much.
CONV_LAYERS: dict[type[nn.Module] | str, ConvLayer] = {
    nn.Conv1d: ConvLayer(TuneConv1d, DeployConv1d),
    nn.Conv2d: ConvLayer(TuneConv2d, DeployConv2d),
    nn.Conv3d: ConvLayer(TuneConv3d, DeployConv3d),
    nn.ConvTranspose1d: ConvLayer(TuneConvTranspose1d, DeployConvTranspose1d),
    nn.ConvTranspose2d: ConvLayer(TuneConvTranspose2d, DeployConvTranspose2d),
    nn.ConvTranspose3d: ConvLayer(TuneConvTranspose3d, DeployConvTranspose3d),
    nn.Linear: ConvLayer(TuneLinear, DeployLinear),
}

NORM_LAYERS: dict[type[nn.Module] | str, NormLayer] = {
    nn.BatchNorm1d: NormLayer(EvalBatchNorm1d, FoldedBatchNorm1d, frozenset({2, 3})),
    nn.BatchNorm2d: NormLayer(EvalBatchNorm2d, FoldedBatchNorm2d, frozenset({4})),
    nn.BatchNorm3d: NormLayer(EvalBatchNorm3d, FoldedBatchNorm3d, frozenset({5})),
    nn.SyncBatchNorm: NormLayer(EvalSyncBatchNorm, FoldedSyncBatchNorm, frozenset({2, 3, 4, 5})),
}


def swap_of(module: nn.Module) -> Swap | None:
    """What a converted module remembers; None for a plain one."""
    swap: Swap | None = module.__dict__.get("_swap")
    return swap


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was found, converted or not."""
    swap = swap_of(module)
    return type(module) if swap is None else swap.plain


def class_name(module: nn.Module) -> str:
    """The name of the class of a module as it was found."""
    return plain_class(module).__name__


def row_of(table: Mapping[type[nn.Module] | str, Row], module: nn.Module) -> Row | None:
    """A table's row of the exact class of a module as it was found."""
    cls = plain_class(module)
    return table.get(cls) or table.get(f"{cls.__module__}.{cls.__qualname__}")


def conv_layer(module: nn.Module) -> ConvLayer | None:
    """The table's row of a convolution: of its exact class, a subclass may compute something else."""
    return row_of(CONV_LAYERS, module)


def norm_layer(module: nn.Module) -> NormLayer | None:
    """The table's row of a BatchNorm: of its exact class, a subclass may compute something else.

    A ``FrozenBatchNorm2d`` of any package is recognised by its buffers: there are as many of them as detectors.
    """
    cls, row = plain_class(module), row_of(NORM_LAYERS, module)
    if row is None and cls.__name__.endswith("FrozenBatchNorm2d") and module._buffers.keys() >= set(Affine._fields[:4]):
        row = NORM_LAYERS[FROZEN]
    return row


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm, supported or not."""
    return isinstance(module, _BatchNorm) or norm_layer(module) is not None


def swap_class(
    module: nn.Module,
    cls: type[nn.Module] | None,
    mode: Mode,
    *,
    bn: nn.Module | None = None,
    conv: nn.Module | None = None,
    flattened: bool = False,
    reason: str = "",
) -> None:
    """Give a module the class ``cls`` and remember how it was found.

    With ``cls`` None, for a BatchNorm that is not in the table, the class stays and a pre-hook holds its ``training``
    flag at False whenever it is called.

    Args:
        module: A plain or a converted module.
        cls: Its new class, or None.
        mode: The mode it is in from now on.
        bn: Of a convolution to be folded, its BatchNorm.
        conv: Of a BatchNorm in a pair, its convolution.
        flattened: Of both, whether the BatchNorm gets the flattened rows of a linear layer's output.
        reason: Of a BatchNorm without a pair, why.
    """
    found = swap_of(module) or Swap(type(module), module.training, mode)
    _drop_links(module)
    if cls is not None:
        _assign_class(module, cls)
    elif stay_frozen not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(stay_frozen)
    if bn is not None:
        module.__dict__["_bn"] = (bn,)
        module.__dict__["_rows"] = flattened
        module.__dict__["_owns_weight"] = type(module.weight) is nn.Parameter
    module.__dict__["_swap"] = found._replace(
        mode=mode, conv=None if conv is None else (conv,), flattened=flattened, reason=reason
    )


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`: the class and the training flag as they were found. Does nothing to a plain module."""
    swap = module.__dict__.pop("_swap", None)
    if swap is None:
        return
    _drop_links(module)
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is stay_frozen]:
        del module._forward_pre_hooks[key]
    _assign_class(module, swap.plain)
    module.training = swap.training


def stay_frozen(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a BatchNorm that is not in the table."""
    module.training = False


def _drop_links(module: nn.Module) -> None:
    for name in ("_bn", "_rows", "_owns_weight", *KEPT):
        module.__dict__.pop(name, None)


def _assign_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if is_parametrized(module):
        # Parametrized after the swap: torch has given this one module a subclass of ours, which holds its properties.
        type(module).__bases__ = (cls,)
    elif type(module) is not cls:
        module.__class__ = cls
