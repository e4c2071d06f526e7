"""Recomputable tensors: what is made of them can be computed again, elementwise, and is not kept then.

The first one is what a layer of ours puts out. From there on the mark is carried by the functions of the table in
`elementwise.py`. While a function runs on a recomputable tensor, saved-tensor hooks put holders (`values.py`) into the
autograd graph in the place of what it saves. The forward pass is the plain one, to the bit.

The mark is a subclass of Tensor. Hooks around the whole model would take the place of the user's own (saved-tensor
hooks do not nest), and an exception or Ctrl-C might leave them behind.

The functions run plainly, and put out plain tensors, where recipes can't work: under other saved-tensor hooks
(``save_on_cpu``, activation checkpointing), in `torch.func`, in forward-mode differentiation, in a graph that is
compiled or traced, and without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_convbn.compat import (
    FakeTensor,
    inside_transform,
    other_saved_tensor_hooks,
    tree_leaves,
    version_of,
    without_torch_function,
)
from lightning_convbn.ops.calls import Call
from lightning_convbn.ops.elementwise import ROWS
from lightning_convbn.ops.recipes import Recipe, takes_recipes
from lightning_convbn.ops.values import Holder, Loan, Value


class Recomputable:
    """Mixin of the recomputable tensors."""

    __slots__ = ()
    _value: Value
    _loan: Loan | None
    _marked_at: int | None  # the version: a write makes the value another one

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function. It saves holders in the place of tensors; its output is recomputable if it can be."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled part of a model decides by itself what it saves
            with without_torch_function():
                return func(*args, **kwargs)
        if any(_is_foreign(kind) for kind in types):
            for leaf in tree_leaves((args, kwargs)):
                unmark(leaf)
            return func(*args, **kwargs)  # the other subclass decides
        with without_torch_function():
            if func in _LEAVES:
                _leave(args[0])
            elif not _is_quiet(func) and torch.is_grad_enabled() and not inside_transform():
                return run(func, args, kwargs)
            return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain tensor."""
        with without_torch_function():
            return Tensor.view_as(self, self).__reduce_ex__(protocol)  # type: ignore[arg-type]


class RecomputableTensor(Recomputable, Tensor):
    """A tensor that the backward pass may compute again."""


class RecomputableFakeTensor(Recomputable, FakeTensor):
    """The same without data, for counting."""


_MARKED: dict[type[Tensor], type[Tensor]] = {Tensor: RecomputableTensor, FakeTensor: RecomputableFakeTensor}
_PLAIN = {marked: plain for plain, marked in _MARKED.items()}
_OURS = {*_MARKED, *_PLAIN}
# A write through `.data` does not count as a new version, so it could make a recipe wrong without a notice.
_LEAVES = {Tensor.data.__get__, Tensor.data.__set__}  # type: ignore[attr-defined]
_QUIET = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.backward, torch.autograd.grad, torch.autograd.backward}


def _is_foreign(kind: type[Any]) -> bool:
    """Whether a subclass of Tensor handles functions by itself. Parameters don't."""
    return kind not in _OURS and kind.__torch_function__ is not nn.Parameter.__torch_function__  # type: ignore[comparison-overlap]


def follow(output: Tensor, *, frozen: bool) -> Tensor:
    """Make the output of a layer recomputable, so that what is made of it can be computed again.

    Args:
        output: A tensor of the graph. It is left plain where recipes can't work.
        frozen: Whether no parameter of the layer wants a gradient.

    Returns:
        ``output`` itself.
    """
    if torch.compiler.is_compiling() or type(output) not in _MARKED:
        return output
    if takes_recipes(output) and not other_saved_tensor_hooks():
        value = Value()
        value.frozen = frozen
        _mark(output, value)
    return output


def follow_function(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function of the table as on a recomputable tensor: its output is one, if recipes can work."""
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or inside_transform()  # type: ignore[attr-defined]
    if plain or not torch.is_grad_enabled() or type(args[0]) not in _OURS:
        return func(*args, **kwargs)
    with without_torch_function():
        return run(func, args, kwargs)


def recipe_of(tensor: Tensor, dtype: torch.dtype) -> Recipe | None:
    """Return the recipe of a tensor that a convolution is about to save, cast to ``dtype``; None for a plain tensor.

    Also None if the cast tensor is to be saved as it is, because it is smaller than what it would be computed from.
    """
    value = value_of(tensor)
    if value is None or (tensor.dtype is not dtype and value.passes() is None):
        return None
    holder = value.save(tensor)
    return holder if tensor.dtype is dtype else lambda: holder().to(dtype)


def value_of(tensor: object) -> Value | None:
    """The value of a recomputable tensor; None for any other, and for one that was written since."""
    if not isinstance(tensor, Recomputable):
        return None
    with without_torch_function():
        return tensor._value if tensor._marked_at == version_of(tensor) else None  # type: ignore[arg-type]


def unmark(tensor: object) -> None:
    """Make a recomputable tensor a plain one again; do nothing to anything else."""
    if isinstance(tensor, Recomputable):
        del tensor._value, tensor._loan, tensor._marked_at
        tensor.__class__ = _PLAIN[type(tensor)]  # type: ignore[assignment, index]


def run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function whose arguments may be recomputable. Torch functions must be off for subclasses."""
    if _writes(func, kwargs):
        _before_write(kwargs.get("out", args[0] if args else None))
    if other_saved_tensor_hooks():
        return func(*args, **kwargs)
    row = ROWS.get(func) if args else None
    call = None if row is None else Call(func, row, args, kwargs, value_of)
    if row is not None and row.saves == "nothing":
        output = func(*args, **kwargs)
    else:
        hooks = saved_tensors_hooks(_pack if call is None else _packing(call), _unpack)
        try:
            hooks.__enter__()
        except RuntimeError:  # within torch.autograd.graph.disable_saved_tensors_hooks
            return func(*args, **kwargs)
        try:
            output = func(*args, **kwargs)
        finally:
            hooks.__exit__()
    if call is not None:
        unchanged = {id(arg) for arg in args if value_of(arg) is not None}  # `contiguous` often has nothing to do
        for tensor, value in call.finish(output) if id(output) not in unchanged else ():
            _mark(tensor, value, call.loan)
    return output


def _mark(output: Any, value: Value, loan: Loan | None = None) -> None:
    kind = type(output)
    if kind in _OURS:
        output._value, output._loan, output._marked_at = value, loan, version_of(output)
        output.__class__ = _MARKED.get(kind, kind)


def _pack(tensor: Tensor) -> Recipe:
    value = value_of(tensor)
    return Holder(Value.kept(tensor)) if value is None else value.save(tensor)


def _packing(call: Call) -> Callable[[Tensor], Recipe]:
    """The graph holds the hook, too. So the hook must not hold the call, which has all tensors."""
    reference: Any = ref(call)
    return lambda tensor: reference().pack(tensor)  # type: ignore[no-any-return]


def _unpack(recipe: Recipe) -> Tensor:
    return recipe()


def _is_quiet(func: Callable[..., Any]) -> bool:
    return func in _QUIET or getattr(func, "__name__", "") == "__get__"


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function may write into its first argument, or into ``out``."""
    name: str = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") or name == "__setitem__"
    return name.endswith("_") or bool(kwargs.get("inplace")) or "out" in kwargs


def _before_write(tensor: object) -> None:
    value = value_of(tensor)
    if value is not None:
        value.before_write()


def _leave(tensor: object) -> None:
    _before_write(tensor)
    unmark(tensor)
