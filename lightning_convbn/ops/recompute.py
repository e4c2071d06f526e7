"""Keeping the input of an elementwise activation in the place of its output, which the backward pass computes again.

An activation such as SiLU keeps its input for its own backward pass, and whoever comes next (a convolution, the product
with a squeeze-excite gate) keeps its output as well. The output is a function of the input, so `recomputed` marks it:
while a torch function runs on a marked tensor, saved-tensor hooks see to it that autograd saves a `Recipe`, which is
the kept input and the function, instead of the tensor. Nothing else changes: the forward pass is the plain one, to the
bit, and autograd wires what the recipe computes to the graph of the forward pass, so double backward works, too.

The mark is a subclass of Tensor and not a pair of hooks around the whole model: those would be in the way of the user's
own (saved-tensor hooks do not nest), and an exception or Ctrl-C might leave them behind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves


class Saved(NamedTuple):
    """A tensor that is saved as it is, checked as autograd checks it where there are no hooks."""

    tensor: Tensor
    version: int

    def value(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: If it has been written since it was saved.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {list(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


class Recipe(NamedTuple):
    """How to compute a tensor again."""

    function: Callable[[Tensor], Tensor]
    kept: Saved

    def value(self) -> Tensor:
        """Compute the tensor, of a detached one: nobody but the caller holds it, and no graph does."""
        return self.function(self.kept.value())


class Recomputed:
    """Mixin of the marked tensors."""

    __slots__ = ()
    _recipe: Recipe | None  # None where the activation can go by its output
    _marked_at: int  # the version: a write makes the recipe wrong

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function; what it saves of marked tensors are recipes. Its results are plain tensors."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled part of a model decides by itself what it saves
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        foreign = not all(issubclass(kind, Recomputed) for kind in types)
        with torch._C.DisableTorchFunctionSubclass():
            if foreign or func in _ESCAPES:
                for value in tree_leaves((args, kwargs)):
                    _unmark(value)
            elif not _saves_nothing(func) and torch.is_grad_enabled() and may_hook():
                with saved_tensors_hooks(_pack, _unpack):
                    return func(*args, **kwargs)
            if not foreign:
                return func(*args, **kwargs)
        return func(*args, **kwargs)  # for the other subclass to decide

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.view_as(self, self).__reduce_ex__(protocol)  # type: ignore[arg-type]


class RecomputedTensor(Recomputed, Tensor):
    """A tensor that the backward pass computes again."""


class RecomputedFakeTensor(Recomputed, FakeTensor):
    """The same without data, for counting."""


_MARKED: dict[type[Tensor], type[Tensor]] = {Tensor: RecomputedTensor, FakeTensor: RecomputedFakeTensor}
_PLAIN = {marked: plain for plain, marked in _MARKED.items()}
# Through `.data` a tensor can be written without a new version, so that a recipe might be wrong without a notice.
_ESCAPES = {Tensor.data.__get__, Tensor.data.__set__}  # type: ignore[attr-defined]


def recomputed(output: Tensor, input: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Mark what an activation has put out, so that those who save it for their backward pass save a recipe.

    Of a clamp the backward pass reads the same off the output as off the input. Then there is nothing to compute: once
    somebody saves the output, and so nobody may write it any more, the activation keeps it too, and drops its input.

    The tensor is left plain where that can't work or saves nothing: no gradient is wanted, the activation's backward
    pass does not keep its input, other saved-tensor hooks are in force (``save_on_cpu``, activation checkpointing), or
    ``torch.compile``, ``torch.jit.trace``, ``torch.func`` or forward-mode differentiation are at work.

    Args:
        output: What the activation has made of its input; the input itself if it works in place.
        input: Its input.
        function: The activation, out of place. Elementwise and deterministic: given what the activation keeps, it must
            compute the same bits. None if its backward pass, given the output for the input, does so.

    Returns:
        ``output`` itself.
    """
    if torch.compiler.is_compiling() or type(output) not in _MARKED or isinstance(input, Recomputed):
        return output
    if output.grad_fn is None or forward_ad._current_level >= 0 or not may_hook():
        return output
    # Of an activation in place autograd keeps a copy of the input, made before the write.
    kept = getattr(output.grad_fn, "_saved_self", None)
    if kept is None or (kept.dtype, kept.shape, kept.stride()) != (output.dtype, output.shape, output.stride()):
        return output
    output._recipe = Recipe(function, _saved(kept)) if function else None  # type: ignore[attr-defined]
    output._marked_at = output._version  # type: ignore[attr-defined]
    output.__class__ = _MARKED[type(output)]
    return output


def save_recipe(saved: Any, tensor: Tensor) -> None:
    """Have a node of the graph, which has saved a marked tensor, save its recipe in its place.

    Args:
        saved: What it has saved, an attribute ``_raw_saved_...`` of the node.
        tensor: The marked tensor. It stays saved if it has been written, or has no recipe.
    """
    packed = _pack(tensor)
    if isinstance(packed, Recipe):
        saved.register_hooks(lambda tensor: packed, _unpack)


def saving_recipes(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within, autograd saves the recipe of ``tensor``, if it is a marked one and there are no other hooks."""
    if torch.compiler.is_compiling() or not (isinstance(tensor, Recomputed) and torch.is_grad_enabled() and may_hook()):
        return nullcontext()
    return saved_tensors_hooks(_pack, _unpack)


def _unmark(value: object) -> None:
    if isinstance(value, Recomputed):
        del value._recipe, value._marked_at
        value.__class__ = _PLAIN[type(value)]  # type: ignore[assignment, index]


def _saves_nothing(func: Callable[..., Any]) -> bool:
    return func is Tensor.dim or getattr(func, "__name__", "") == "__get__"


def may_hook() -> bool:
    """Whether hooks may be set without being in the way of others."""
    enabled: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    tracing = torch._C._get_tracing_state() is not None or peek_interpreter_stack() is not None
    return enabled and not tracing and not others_hook()


def others_hook() -> bool:
    """Whether saved-tensor hooks are in force: those of activation checkpointing, say."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        return top(False) is not None
    # Before PyTorch 2.8 one has to try: what is saved under hooks takes no others.
    with torch.inference_mode(False), torch.enable_grad():
        node: Any = torch.ones((), requires_grad=True).sin().grad_fn
    try:
        node._raw_saved_self.register_hooks(Tensor.detach, Tensor.detach)
    except RuntimeError:
        return True
    return False


def _saved(tensor: Tensor) -> Saved:
    # Detached, because what is saved of an output must not hold its own graph.
    return Saved(tensor.detach(), tensor._version)


def _pack(tensor: Tensor) -> Saved | Recipe:
    if isinstance(tensor, Recomputed) and tensor._marked_at == tensor._version:
        if tensor._recipe is not None:
            return tensor._recipe
        _share(tensor)
    return _saved(tensor)


def _share(output: Tensor) -> None:
    """Have an activation keep its output, which somebody has just saved, in the place of its input."""
    saved, node = _saved(output), cast(Any, output.grad_fn)
    node._raw_saved_self.register_hooks(id, lambda _: saved.value())
    _unmark(output)


def _unpack(packed: Saved | Recipe) -> Tensor:
    return packed.value()
