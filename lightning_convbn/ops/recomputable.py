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

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import has_torch_function

from lightning_convbn.compat import (
    FakeTensor,
    base_of,
    inside_transform,
    other_saved_tensor_hooks,
    storage_id,
    tree_leaves,
    version_of,
    without_torch_function,
)
from lightning_convbn.ops.aliases import Aliases
from lightning_convbn.ops.calls import Call
from lightning_convbn.ops.elementwise import ROWS
from lightning_convbn.ops.recipes import Recipe, Source, takes_recipes
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
        if not _OURS.issuperset(types) and any(map(is_foreign, types)):
            for leaf in tree_leaves((args, kwargs)):
                unmark(leaf)
            return func(*args, **kwargs)  # the other subclass decides
        with without_torch_function():
            if func in _LEAVES:
                unmark(args[0])
            output = func(*args, **kwargs) if _is_quiet(func) else run(func, args, kwargs)
            _note_strangers((*args, *kwargs.values()), output)
            return output

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
_READERS = {"__index__", "__int__", "__invert__", "__iter__"}
_QUIET = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.backward, torch.autograd.grad, torch.autograd.backward}


def is_foreign(kind: type[Any]) -> bool:
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
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return func(*args, **kwargs)
    if type(args[0]) not in _MARKED or has_torch_function(args):
        return func(*args, **kwargs)
    with without_torch_function():
        return run(func, args, kwargs)


def recipe_of(tensor: Tensor, dtype: torch.dtype) -> Recipe | None:
    """Return the recipe of a tensor that a convolution is about to save, cast to ``dtype``; None for a plain tensor.

    Also None if the cast tensor is to be saved as it is, because it is smaller than what it would be computed from.
    """
    value = value_of(tensor)
    if value is None or (tensor.dtype is not dtype and not value.can_be_had(tensor.numel() * dtype.itemsize)):
        return None
    holder = value.save(tensor)
    return holder if tensor.dtype is dtype else lambda _=None: holder().to(dtype)


def step_aside_for_other_hooks(*args: object) -> bool:
    """If other saved-tensor hooks are in force, go by the arguments themselves: a checkpoint, say, holds these.

    Torch functions must be off for subclasses.

    Returns:
        Whether such hooks are in force.
    """
    if not other_saved_tensor_hooks():
        return False
    for tensor in _with_bases(args):
        value, tensor._loan = value_of(tensor), None
        if value is not None:
            value.hold(Source(tensor))
    return True


def _with_bases(args: object) -> list[Any]:
    """Return the recomputable tensors among some arguments, and those that they are views of: a view holds its base."""
    marked: list[Any] = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Recomputable)]
    return marked + [base for base in map(base_of, marked) if isinstance(base, Recomputable)]


def value_of(tensor: object) -> Value | None:
    """The value of a recomputable tensor; None for any other, and for one that was written since.

    Torch functions must be off for subclasses.
    """
    if not isinstance(tensor, Recomputable) or tensor._marked_at != version_of(tensor):  # type: ignore[arg-type]
        return None
    return tensor._value if tensor._value.aliases.are_followed else None  # type: ignore[union-attr]


def unmark(tensor: object) -> None:
    """Make a recomputable tensor a plain one again, whose writes are not seen; do nothing to anything else."""
    if isinstance(tensor, Recomputable):
        tensor._value.aliases.leave()  # type: ignore[union-attr]
        del tensor._value, tensor._loan, tensor._marked_at
        tensor.__class__ = _PLAIN[type(tensor)]  # type: ignore[assignment, index]


def run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function whose arguments may be recomputable. Torch functions must be off for subclasses."""
    if _writes(func, kwargs):
        for leaf in tree_leaves((args[:1], kwargs.get("input"), kwargs.get("out"))):
            _before_write(leaf)
    if not torch.is_grad_enabled():  # an autograd.Function, say, that may save its input past our hooks
        for tensor in _with_bases((args, kwargs)):
            tensor._loan = None
        return func(*args, **kwargs)
    if inside_transform() or step_aside_for_other_hooks(*args, *kwargs.values()):
        return func(*args, **kwargs)
    row = ROWS.get(func) if args else None
    if row is not None and row.kind == "parts":
        for part in args[0]:
            _follow_part(part)
    call = None if row is None else Call(func, row, args, kwargs, value_of)
    if row is not None and row.saves == "nothing":
        output = func(*args, **kwargs)
    else:
        hooks = saved_tensors_hooks(_pack if call is None else _packing(call), _unpack)
        try:
            try:
                hooks.__enter__()
            except RuntimeError:  # within torch.autograd.graph.disable_saved_tensors_hooks
                return func(*args, **kwargs)
            output = func(*args, **kwargs)
        finally:
            if other_saved_tensor_hooks():  # Ctrl-C may come before they are in force, or right after
                hooks.__exit__()
    if call is not None and not _is_unchanged(output, args):
        for tensor, value in call.finish(output):
            _mark(tensor, value, call.loan, _aliases_of(tensor, call.tensors))
    return output


def _is_unchanged(output: Any, args: tuple[Any, ...]) -> bool:
    """Whether the output is an argument that was not written: `contiguous` often has nothing to do."""
    return any(output is arg for arg in args) and value_of(output) is not None


def _mark(output: Any, value: Value, loan: Loan | None = None, aliases: Aliases | None = None) -> None:
    kind = type(output)
    if kind in _OURS:
        (aliases or Aliases()).add(value)
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


def _follow_part(part: object) -> None:
    """Make a part of a concatenation recomputable, so that a write to it is seen."""
    if not isinstance(part, Tensor) or part.grad_fn is None or not part.is_floating_point():
        return
    if not isinstance(part, Recomputable) or part._marked_at != version_of(part):
        _mark(part, Value(), None, _aliases_of(part, [part]))


def _aliases_of(output: Tensor, tensors: Sequence[Tensor]) -> Aliases | None:
    """Return the aliases of the tensor whose storage an output has; None if its storage is a new one."""
    for tensor in tensors:
        if isinstance(tensor, Recomputable) and storage_id(tensor) == storage_id(output):
            return tensor._value.aliases
    return None


def _note_strangers(args: tuple[Any, ...], output: Any) -> None:
    """Note the plain tensors in an output that share the storage of a recomputable argument.

    Nothing is computed for them, and they may hold the argument; so it need not hold what it is made of any more.
    """
    for plain in output if isinstance(output, (tuple, list)) else (output,):
        if type(plain) in _MARKED and plain.layout is torch.strided and not inside_transform():
            aliases = _aliases_of(plain, [arg for arg in args if isinstance(arg, Recomputable)])  # type: ignore[misc]
            if aliases is not None:
                aliases.add_stranger(plain)
                for tensor in _with_bases(args):
                    if tensor._value.aliases is aliases:
                        tensor._loan = None


def _is_quiet(func: Callable[..., Any]) -> bool:
    return func in _QUIET or getattr(func, "__name__", "") == "__get__"


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function may write into its first argument, or into ``out``."""
    name: str = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _READERS)
    return name.endswith("_") or bool(kwargs.get("inplace")) or "out" in kwargs


def _before_write(tensor: object) -> None:
    if isinstance(tensor, Recomputable):
        tensor._value.aliases.before_write()  # type: ignore[union-attr]
