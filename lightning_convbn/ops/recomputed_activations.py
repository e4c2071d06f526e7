"""Recomputed activations: an elementwise activation keeps its input, and its output is computed again.

An activation such as SiLU keeps its input for its own backward pass. Whoever comes next, a convolution or the product
with a squeeze-excite gate, keeps its output as well. The output is a function of the input, so `recomputed` marks it
with a recipe: while a torch function runs on a marked tensor, saved-tensor hooks see to it that autograd saves the
recipe instead of the tensor. The forward pass is the plain one, to the bit.

The mark is a subclass of Tensor. Hooks around the whole model would take the place of the user's own (saved-tensor
hooks do not nest), and an exception or Ctrl-C might leave them behind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_convbn.compat import (
    FakeTensor,
    other_saved_tensor_hooks,
    replace_saved,
    saved_by,
    tree_leaves,
    version_of,
    without_torch_function,
)
from lightning_convbn.ops.recipes import Recipe, Source, takes_recipes


class Recomputed:
    """Mixin of the marked tensors."""

    __slots__ = ()
    _recipe: Recipe | None  # None where the activation can use its output in the place of its input
    _marked_at: int | None  # the version: a write makes the recipe wrong

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function. It saves recipes in the place of marked tensors, and returns plain tensors."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled part of a model decides by itself what it saves
            with without_torch_function():
                return func(*args, **kwargs)
        foreign = not all(issubclass(kind, Recomputed) for kind in types)
        with without_torch_function():
            if foreign or func in _ESCAPES:
                for value in tree_leaves((args, kwargs)):
                    unmark(value)
            elif not _saves_nothing(func) and torch.is_grad_enabled() and not other_saved_tensor_hooks():
                return _saving_recipes(func, args, kwargs)
            if not foreign:
                return func(*args, **kwargs)
        return func(*args, **kwargs)  # the other subclass decides

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain tensor."""
        with without_torch_function():
            return Tensor.view_as(self, self).__reduce_ex__(protocol)  # type: ignore[arg-type]


class RecomputedTensor(Recomputed, Tensor):
    """A tensor that the backward pass computes again."""


class RecomputedFakeTensor(Recomputed, FakeTensor):
    """The same without data, for counting."""


_MARKED: dict[type[Tensor], type[Tensor]] = {Tensor: RecomputedTensor, FakeTensor: RecomputedFakeTensor}
_PLAIN = {marked: plain for plain, marked in _MARKED.items()}
# A write through `.data` does not count as a new version, so a recipe could become wrong without a notice.
_ESCAPES = {Tensor.data.__get__, Tensor.data.__set__}  # type: ignore[attr-defined]


def recomputed(output: Tensor, input: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Mark the output of an activation, so that autograd saves a recipe wherever it would save the output.

    The backward pass of a clamp only needs to know which values were clipped. The output shows that as well as the
    input does. Then there is nothing to compute: as soon as somebody saves the output, the activation keeps the output,
    too, and drops its input.

    The output is left plain where a mark can't work or saves nothing: no gradient is wanted; the activation does not
    keep its input; other saved-tensor hooks are in force (``save_on_cpu``, activation checkpointing); or
    ``torch.compile``, ``torch.jit.trace``, ``torch.func`` or forward-mode differentiation is at work.

    Args:
        output: The output of the activation; its input itself if it works in place.
        input: Its input.
        function: The activation, out of place. Elementwise and deterministic: given what the activation keeps, it must
            compute the same bits. None if the activation can use its output in the place of its input.

    Returns:
        ``output`` itself.
    """
    if torch.compiler.is_compiling() or type(output) not in _MARKED or isinstance(input, Recomputed):
        return output
    if not takes_recipes(output) or other_saved_tensor_hooks():
        return output
    # Of an activation in place, autograd keeps a copy of the input that it made before the write.
    kept = saved_by(output.grad_fn, "self")
    if kept is None or (kept.dtype, kept.shape, kept.stride()) != (output.dtype, output.shape, output.stride()):
        return output
    output._recipe = partial(_apply, function, Source(kept)) if function else None  # type: ignore[attr-defined]
    output._marked_at = version_of(output)  # type: ignore[attr-defined]
    output.__class__ = _MARKED[type(output)]
    return output


def recipe_of(tensor: Tensor) -> Recipe | None:
    """Return the recipe of a tensor that is about to be saved; None if it is to be saved as it is.

    If an activation can use its output in the place of its input, it does so from now on, and the tensor becomes plain.
    """
    if isinstance(tensor, Recomputed) and tensor._marked_at == version_of(tensor):
        if tensor._recipe is not None:
            return tensor._recipe
        _share(tensor)
    return None


def unmark(value: object) -> None:
    """Make a marked tensor a plain one again; do nothing to anything else."""
    if isinstance(value, Recomputed):
        del value._recipe, value._marked_at
        value.__class__ = _PLAIN[type(value)]  # type: ignore[assignment, index]


def _apply(function: Callable[[Tensor], Tensor], source: Source) -> Tensor:
    return function(source.value())


def _share(output: Any) -> None:
    """Have an activation keep its output in the place of its input, now that somebody else saves the output, too."""
    replace_saved(output.grad_fn, "self", Source(output).value)
    unmark(output)


def _saving_recipes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hooks = saved_tensors_hooks(_pack, _unpack)
    try:
        hooks.__enter__()
    except RuntimeError:  # within torch.autograd.graph.disable_saved_tensors_hooks
        return func(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    finally:
        hooks.__exit__()


def _pack(tensor: Tensor) -> Recipe:
    return recipe_of(tensor) or Source(tensor).value


def _unpack(recipe: Recipe) -> Tensor:
    return recipe()


def _saves_nothing(func: Callable[..., Any]) -> bool:
    return func is Tensor.dim or getattr(func, "__name__", "") == "__get__"
