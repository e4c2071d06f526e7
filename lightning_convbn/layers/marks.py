"""Marks on what folded convolutions put out: a fold is right whatever the model does with it.

The output of a folded convolution is normalised already. That is right for the BatchNorm of its pair, and for nobody
else. A proof beforehand says that nobody else gets it; but a run may go another way than the proof: a branch, a hook, a
layer that was replaced. So the convolution marks its output.

- The BatchNorm of the pair takes the mark off, and returns the folded output.
- For everybody else the marked tensor stands for the output of the plain convolution. It is computed when it is needed.
- A BatchNorm that gets a tensor without its mark normalises it, as in Eval mode.

The mark is a subclass of Tensor. It shares the storage of the folded output, so it takes no memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_convbn.compat import (
    FakeTensor,
    is_compiled,
    tree_map_only,
    watches_input,
    watches_output,
    without_torch_function,
)
from lightning_convbn.layers.calls import Call, described
from lightning_convbn.layers.graphs import may_be_normalised

Applied = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


class Marked:
    """Mixin of the marked tensors."""

    _call: Any  # a `Call`; the views of a marked tensor share it
    _folded: Tensor
    _channels: int  # the dimension that holds the channels
    _views: tuple[Applied, ...] = ()  # what was applied to it that moves values, and computes nothing
    _plain: Tensor | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function on what the plain convolution puts out."""
        kwargs = kwargs or {}
        with without_torch_function():
            if func in _READS_NO_VALUES:
                return func(*args, **kwargs)
            if func in VIEWS and args and isinstance(args[0], Marked):
                viewed = _viewed(args[0], (func, args[1:], kwargs))
                if viewed is not None:
                    return viewed
            if func in _TAKES_ONLY_THE_SHAPE and len(args) > 1 and isinstance(args[1], Marked):
                args = args[0], args[1]._folded
            if func in _ASKS_FOR_GRADIENTS:
                _check_gradients(func, args, kwargs)
            args, kwargs = tree_map_only(Marked, plain_output, (args, kwargs))
        return func(*args, **kwargs)


class MarkedTensor(Marked, Tensor):
    """The output of a folded convolution."""


class MarkedFakeTensor(Marked, FakeTensor):
    """The same without data, for counting."""


_MARKED: dict[type[Tensor], type[Tensor]] = {Tensor: MarkedTensor, FakeTensor: MarkedFakeTensor}
_READS_NO_VALUES = {
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_meta")),
}
_TAKES_ONLY_THE_SHAPE = {Tensor.reshape_as, Tensor.view_as, Tensor.expand_as}  # of the second argument
_ASKS_FOR_GRADIENTS = {torch.autograd.grad, Tensor.retain_grad, Tensor.register_hook}
VIEWS = {
    *(Tensor.view, Tensor.contiguous),
    *(getattr(place, name) for place in (Tensor, torch) for name in ("flatten", "reshape", "transpose", "permute")),
}
"""Functions that move values and compute none. A mark follows them, as far as they are called without names."""


def mark(output: Tensor, call: Call, channels: int) -> Tensor | None:
    """Mark the output of a folded convolution; return None if tensors of this class can't be marked.

    Args:
        output: The folded output.
        call: The call that it comes from.
        channels: The dimension that holds the channels.
    """
    call.folded = output
    return _marked(output, call, channels)


def _marked(folded: Tensor, call: Call, channels: int) -> Any:
    kind = _MARKED.get(type(folded))
    if kind is None:
        return None
    marked: Any = folded.as_subclass(kind) if kind is MarkedTensor else folded.detach()
    marked.__class__ = kind
    marked._call, marked._folded, marked._channels = call, folded, channels
    return marked


def marked_plain(output: Tensor, call: Call) -> Tensor:
    """Mark the plain output of a convolution that is folded in graphs, so that nobody takes it for a folded one."""
    marked: Any = mark(output, call, channels=1) if may_be_normalised(call.conv) else None
    if marked is None:
        return output
    call.plain = output
    return marked  # type: ignore[no-any-return]


def _viewed(marked: Marked, applied: Applied) -> Tensor | None:
    """Apply a view to a marked tensor. The result is marked if it has a dimension of channels still, else None."""
    func, args, kwargs = applied
    if marked._call.plain is not None or kwargs:
        return None
    before = marked._folded.shape
    folded = func(marked._folded, *args)
    channels = marked._channels
    if func in (Tensor.transpose, torch.transpose):
        first, second = (dim % len(before) for dim in args)
        channels = {first: second, second: first}.get(channels, channels)
    elif func in (Tensor.permute, torch.permute):
        order = args if isinstance(args[0], int) else args[0]
        channels = [dim % len(before) for dim in order].index(channels)
    elif channels == len(before) - 1 and folded.shape[-1:] == before[-1:]:
        channels = folded.dim() - 1
    elif folded.shape[: channels + 1] != before[: channels + 1]:
        return None
    viewed = _marked(folded, marked._call, channels)
    if viewed is not None:
        viewed._views = (*marked._views, applied)
    return viewed  # type: ignore[no-any-return]


def plain_output(marked: Marked, *, noted: bool = True) -> Tensor:
    """What the plain convolution puts out in the place of a marked tensor. It is computed once.

    Args:
        marked: A marked tensor.
        noted: Whether the check of the BatchNorm, if one is going on, is to note this.
    """
    check = vars(marked._call.bn).get("_check")
    if noted and check is not None:
        check.note_plain(marked._call.bn)
    if marked._plain is None:
        output = marked._call.plain_output()
        for func, args, kwargs in marked._views:
            output = func(output, *args, **kwargs)
        marked._plain = output
    return marked._plain


def _check_gradients(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check that a gradient can be had with respect to marked tensors.

    Raises:
        RuntimeError: If the BatchNorm has had the folded output, and what is differentiated depends on that.
    """
    wanted = args[:1]
    if func is torch.autograd.grad:
        wanted, options = args[1], {**kwargs, "retain_graph": True, "allow_unused": True, "materialize_grads": False}
        outputs = tree_map_only(Marked, plain_output, args[0])
    for marked in wanted:
        if not isinstance(marked, Marked) or not marked._call.taken:
            continue
        if func is torch.autograd.grad and torch.autograd.grad(outputs, marked._call.folded, **options)[0] is None:
            continue
        raise RuntimeError(
            f"{described(marked._call.conv)} is folded with its BatchNorm, which has run since. The gradient with "
            "respect to the output between the two is wanted too late: call its retain_grad() before the BatchNorm "
            "runs, or leave this pair out: set_mode(model, mode, pairs=...)"
        )


def taken_off(marked: Marked, bn: nn.Module) -> Tensor | None:
    """The folded output behind a mark, if it is right for a BatchNorm; None if this must normalise the plain output.

    It is right for the BatchNorm of the pair, if it gets the channels in its dimension 1 and nobody has changed them,
    and if gradients are wanted now as they were in the call.

    Raises:
        RuntimeError: If checkpointing with ``use_reentrant=True`` has run the convolution, and not the BatchNorm.
    """
    call = marked._call
    if call.bn is not bn or call.plain is not None or call.taken or marked._channels != 1:
        return None
    if call.with_grad == torch.is_grad_enabled():
        call.taken = True  # a second call of the BatchNorm must give a tensor of its own
        return marked._folded.contiguous() if marked._views else marked._folded  # so a BatchNorm puts out a view
    with without_torch_function():
        if not call.with_grad and marked.requires_grad:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{described(call.conv)} was run under activation checkpointing with use_reentrant=True, and its "
                "BatchNorm was not. A fold over that border can't be differentiated: use checkpoint(..., "
                "use_reentrant=False), or checkpoint a block that holds both"
            )
    return None


def is_normalised(input: Tensor, conv: nn.Module, bn: nn.Module) -> bool:
    """Whether what a BatchNorm gets is normalised already, although no mark was taken off it: in a graph, by the proof.

    Raises:
        RuntimeError: If it may be, and nobody knows: outside of a graph, while the convolution is folded in graphs.
    """
    if isinstance(input, Marked) or has_watching_hooks(conv, bn):
        return False
    if seen_through():
        return conv.is_folded_in_graphs()  # type: ignore[operator, no-any-return]
    if may_be_normalised(conv) and type(input) in _MARKED:
        raise RuntimeError(
            f"{described(bn)} got a tensor without a mark, and its {described(conv)} is folded in a graph "
            "(torch.compile). If the graph ends between the two, the tensor is normalised already; else it is not. "
            "Compile a block that holds both layers, before the switch; or leave this pair out: "
            "set_mode(model, mode, pairs=...)"
        )
    return False


def unmarked(input: Tensor) -> Tensor:
    """What a layer gets: the plain output in the place of a marked tensor, and anything else as it is.

    If a marked tensor has come into a graph, the graph ends, and goes on with the plain output.
    """
    if not isinstance(input, Marked):
        return input
    return _plain_outside_of_graph(input) if seen_through() else plain_output(input)


@torch.compiler.disable(reason="a folded convolution was compiled without the layer that reads its output")  # type: ignore[untyped-decorator]
def _plain_outside_of_graph(input: Marked) -> Tensor:
    return plain_output(input)


def has_watching_hooks(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether somebody wants what passes from the convolution to its BatchNorm, or the gradient of that.

    Hooks may, and so does a compiler that was given one of the two alone, by ``module.compile()``.
    """
    return watches_output(conv) or watches_input(bn) or is_compiled(conv) or is_compiled(bn)


def seen_through() -> bool:
    """Whether a graph is being made of the model, by a compiler or by a trace. There is no mark in a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None  # type: ignore[attr-defined]
