"""Every private name of PyTorch that the package uses, so that a new release breaks in one room.

`docs/contributing/private-names.md` lists each name with its reason, what breaks without it, and how long it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass as without_torch_function
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._pytree import tree_leaves

__all__ = [
    "BatchNorm",
    "FakeTensor",
    "forward_pre_hooks",
    "inside_transform",
    "other_saved_tensor_hooks",
    "replace_saved",
    "saved_by",
    "tree_leaves",
    "version_of",
    "without_torch_function",
]


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place (``_version``); None for an inference tensor, which does not count."""
    return None if tensor.is_inference() else tensor._version


def inside_transform() -> bool:
    """Whether a transform of ``torch.func`` is running: ``vmap``, ``grad``, ``jvp`` or ``functionalize``."""
    return peek_interpreter_stack() is not None


def other_saved_tensor_hooks() -> bool:
    """Whether default saved-tensor hooks are in force: those of activation checkpointing, say."""
    return _top_saved_tensors_default_hooks(False) is not None


def saved_by(node: Any, name: str) -> Tensor | None:
    """Return the tensor that a node of the autograd graph has saved under a name; None if there is none."""
    return getattr(node, f"_saved_{name}", None)


def replace_saved(node: Any, name: str, recipe: Callable[[], Tensor]) -> bool:
    """Have a node of the autograd graph keep a recipe in the place of a tensor that it has saved.

    Args:
        node: A ``grad_fn``.
        name: What the node calls the tensor: ``weight`` of its attribute ``_raw_saved_weight``.
        recipe: Computes the tensor. It must not hold ``node``.

    Returns:
        Whether the recipe is in place. It is not if the node has saved nothing there or is of another kind, as those
        behind a subclass of Tensor; nor if other saved-tensor hooks (activation checkpointing, ``save_on_cpu``) hold
        the tensor: each saved tensor takes one pair of hooks.
    """
    try:
        # `id` packs the tensor: the hook must return something, and the recipe needs nothing of it.
        getattr(node, f"_raw_saved_{name}").register_hooks(id, lambda _: recipe())
    except (AttributeError, RuntimeError):
        return False
    return True


def forward_pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the forward pre-hooks of a module (``_forward_pre_hooks``), to look at or to delete from."""
    return module._forward_pre_hooks
