"""Marks on what folded convolutions put out: a fold is right whatever the model does with it.

The output of a folded convolution is normalised already. That is right for the BatchNorm of its pair, and for nobody
else. A proof beforehand says that nobody else gets it; but a run may go another way than the proof: a branch, a hook, a
layer that was replaced. So the convolution gives away a *mark* in the place of its output.

- The BatchNorm of the pair takes the folded output from behind the mark.
- For everybody else the mark stands for the output of the plain convolution, which is computed when it is needed.
- A BatchNorm that gets anything else normalises it, as in Eval mode.

The mark is a subclass of Tensor. Functions of Python reach ``__torch_function__``, and operators that are called from
C++ (by TorchScript, or within an ``autograd.Function``) reach ``__torch_dispatch__``. So nobody reads folded values.
What an ``autograd.Function`` or TorchScript makes of a mark would send a gradient along the mark's own edge in the
autograd graph. That gradient is not the plain convolution's, so a node on this edge raises an error that names both
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_convbn.compat import (
    DelayedError,
    FakeTensor,
    inside_transform,
    pack_hook,
    tree_map_only,
    without_torch_function,
)
from lightning_convbn.layers.calls import Call, names_of
from lightning_convbn.layers.state import Pair


class Mark:
    """Mixin of the marks. One is made in each forward of a pair, so what is seldom needed is an attribute of the class.

    Attributes:
        call: The call of the convolution.
        plain: The plain output, once somebody has asked for it.
        taken: Whether the BatchNorm has the folded output.
    """

    call: Call
    plain: Tensor | None = None
    taken = False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function on what the plain convolution puts out."""
        kwargs = kwargs or {}
        with without_torch_function():
            name = name_of(func)
            if name in _OF_THE_GRAPH and func.__name__ == "__get__":
                return args[0].call.wants_gradient() is (name == "requires_grad")
            _check_written(func, args)
            if not reads_values(name, arguments=len(args) + len(kwargs)):
                return func(*tree_map_only(Mark, _folded, args), **tree_map_only(Mark, _folded, kwargs))
            if len(args) > 1 and isinstance(args[1], Mark) and not reads_values(name, 1):
                args = args[0], _folded(args[1]), *args[2:]
            if func in _ASKS_FOR_GRADIENTS:
                _check_gradients(func, args, kwargs)
            args, kwargs = tree_map_only(Mark, plain_output, (args, kwargs))
        return func(*args, **kwargs)


class MarkedTensor(Mark, Tensor):
    """A mark."""

    def as_subclass(self, cls: type[Any]) -> Any:
        """Return the plain output as a tensor of another class. PyTorch asks no torch function here."""
        return plain_output(self).as_subclass(cls)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the values of the plain output. Autograd is above, and has taken the mark's own edge."""
        with torch.no_grad():
            args, kwargs = tree_map_only(Mark, _plain_values, (args, kwargs or {}))
            return func(*args, **kwargs)


class MarkedFakeTensor(Mark, FakeTensor):
    """A mark without data, for counting."""


_READS_NO_VALUES = {
    *("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "__len__", "get_device"),
    *("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_cpu", "is_meta", "is_nested", "is_sparse"),
    *("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
}
_READS_NO_VALUES_OF_SECOND = {"reshape_as", "view_as", "expand_as", "type_as", "to"}


def reads_values(name: str, position: int = 0, arguments: int = 2) -> bool:
    """Whether a function reads values of a tensor. Folding changes the values of an output, and nothing else.

    Args:
        name: The name of the function, or of an attribute.
        position: At which position it gets the tensor.
        arguments: How many arguments it gets.
    """
    if name in _READS_NO_VALUES or (name == "type" and arguments == 1):
        return False
    return not (position == 1 and name in _READS_NO_VALUES_OF_SECOND)


_OF_THE_GRAPH = ("requires_grad", "is_leaf")
_ASKS_FOR_GRADIENTS = {torch.autograd.grad, Tensor.retain_grad, Tensor.register_hook}


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a function, or of the attribute that a getter reads."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name


def mark(call: Call) -> Tensor | None:
    """Return a mark in the place of the output of a folded convolution; None if tensors of its class can't have one."""
    folded = call.folded
    if type(folded) is Tensor:
        # The error's node stands between the mark and the graph. Inside a transform everything is seen by Python.
        guarded = guard_of(call.pair)(folded) if folded.requires_grad and not inside_transform() else folded
        marked: Any = guarded.as_subclass(MarkedTensor)
    elif type(folded) is FakeTensor:
        marked = folded.detach()
        marked.__class__ = MarkedFakeTensor
    else:
        return None
    marked.call = call
    return marked  # type: ignore[no-any-return]


def plain_output(marked: Mark, *, noted: bool = True) -> Tensor:
    """What the plain convolution puts out in the place of a mark. It is computed once.

    Args:
        marked: A mark.
        noted: Whether the check of the pair, if one is going on, is to note this.

    Raises:
        RuntimeError: If the input of the convolution was written since, or its parameters were written or moved.
    """
    call = marked.call
    if noted and call.pair.check is not None:
        call.pair.check.note_plain(call.pair)
    if marked.plain is None:
        marked.plain = call.plain_output()
    return marked.plain


def taken_off(marked: Mark, pair: Pair | None) -> Tensor | None:
    """The folded output behind a mark, if it is right for the BatchNorm of a pair; None if this must normalise.

    It is right if the mark is of its pair, if nobody has read or changed the plain output, if the BatchNorm is as it
    was, and if gradients are wanted now as they were in the call. A checkpoint may begin between the two layers. It
    runs the BatchNorm a second time, and not the convolution: then the BatchNorm normalises both times.

    Raises:
        RuntimeError: If checkpointing with ``use_reentrant=True`` has run the convolution, and not the BatchNorm.
    """
    call = marked.call
    if call.pair is not pair or marked.plain is not None or marked.taken or not call.is_up_to_date():
        return None
    hook = pack_hook()
    if hook is not None and hook is not call.pack_hook:
        return None
    if call.with_grad == torch.is_grad_enabled():
        marked.taken = True  # a second call of the BatchNorm must give a tensor of its own
        return call.folded
    with without_torch_function():
        if not call.with_grad and marked.requires_grad:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{names_of(call.pair)}: the convolution was run under activation checkpointing with "
                "use_reentrant=True, and its BatchNorm was not. A fold over that border can't be differentiated: use "
                "checkpoint(..., use_reentrant=False), or checkpoint a block that holds both"
            )
    return None


def guard_of(pair: Pair) -> Callable[[Tensor], Tensor]:
    """Return a function that gives a tensor an autograd node which raises, and names the layers of a pair."""
    if pair.guard is None:
        pair.guard = DelayedError(
            f"{names_of(pair)}. The output between the two went into an autograd.Function, a TorchScript function or "
            "other code that Python does not see, and a gradient came back from there. It can't be the gradient of the "
            "plain convolution: leave this pair out: set_mode(model, mode, pairs=...)",
            1,
        )
    return pair.guard


def unmarked(input: Tensor) -> Tensor:
    """What a layer gets: the plain output in the place of a mark, and anything else as it is.

    If a mark has come into a graph, the graph ends, and goes on with the plain output.
    """
    return _plain_outside_of_graph(input) if isinstance(input, Mark) else input


@torch.compiler.disable(reason="a folded convolution was compiled without the layer that reads its output")  # type: ignore[untyped-decorator]
def _plain_outside_of_graph(input: Mark) -> Tensor:
    return plain_output(input)


def _folded(marked: Mark) -> Tensor:
    return marked.call.folded.detach()


def _plain_values(marked: Mark) -> Tensor:
    """The values of the plain output, for an operator below autograd. Their graph can't be had there."""
    call = marked.call
    if call.pair.check is not None:
        call.pair.check.note_plain(call.pair)
    return call.plain_output().detach() if marked.plain is None else marked.plain.detach()


def _check_written(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Check that a mark is not written in place by an ``autograd.Function``, which runs without gradients.

    Raises:
        RuntimeError: If it is.
    """
    name: str = getattr(func, "__name__", "")
    in_place = name.endswith("_") and (not name.startswith("__") or name in ("__setitem__", "__set__"))
    if in_place and args and isinstance(args[0], Mark):
        call = args[0].call
        if not torch.is_grad_enabled() and call.wants_gradient():
            raise RuntimeError(
                f"{names_of(call.pair)}. The output between the two is written in place, without gradients. Write to a "
                "copy, or leave this pair out: set_mode(model, mode, pairs=...)"
            )


def _check_gradients(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check that a gradient can be had with respect to marks.

    Raises:
        RuntimeError: If the BatchNorm has had the folded output, and what is differentiated depends on that.
    """
    wanted = args[:1]
    if func is torch.autograd.grad:
        wanted, options = args[1], {**kwargs, "retain_graph": True, "allow_unused": True, "materialize_grads": False}
        outputs = tree_map_only(Mark, plain_output, args[0])
    for marked in wanted:
        if not isinstance(marked, Mark) or not marked.taken:
            continue
        if func is torch.autograd.grad and torch.autograd.grad(outputs, marked.call.folded, **options)[0] is None:
            continue
        raise RuntimeError(
            f"{names_of(marked.call.pair)}, and the BatchNorm has run since. The gradient with respect to the output "
            "between the two is wanted too late: call its retain_grad() before the BatchNorm runs, or leave this pair "
            "out: set_mode(model, mode, pairs=...)"
        )
