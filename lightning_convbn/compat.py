"""Every private name of PyTorch and Lightning that the package uses, so that a new release breaks one file.

No other file of the package has a private name. `docs/contributing/private-names.md` lists what stands here: why, what
breaks without it, and since which version it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch import _assert as assert_in_graph
from torch._C import DisableTorchFunctionSubclass as without_torch_function
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as outside_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "COMPILED_CALL",
    "HOOKS",
    "RUNS_ENGINE",
    "FakeTensor",
    "TorchDispatchMode",
    "assert_in_graph",
    "base_of",
    "changes_input",
    "compiled_by_lightning",
    "fake_tensor_mode",
    "has_gradient_hooks",
    "inside_transform",
    "is_compiled",
    "is_of_compiler",
    "load_as",
    "other_saved_tensor_hooks",
    "outside_fake_mode",
    "read",
    "replace_saved",
    "saved_by",
    "storage_id",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "version_of",
    "watches_input",
    "watches_output",
    "without_modes",
    "without_torch_function",
]

# ------------------------------------------------------------------------------------------------ autograd and tensors


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place (``_version``); None for an inference tensor, which does not count."""
    return None if tensor.is_inference() else tensor._version


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


def storage_id(tensor: Tensor) -> int:
    """What tells storages apart that are alive (``_cdata``); also those of tensors without data."""
    return tensor.untyped_storage()._cdata


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that a tensor is a view of (``_base``), if any. It is held by the view."""
    return tensor._base


RUNS_ENGINE = "_engine_run_backward"
"""The name of the Python function that calls autograd's engine, in ``torch.autograd.graph``."""


def is_of_compiler(module: str) -> bool:
    """Whether a module belongs to ``torch.compile`` (``torch._dynamo``, ``torch._compile``), by its name."""
    return module.startswith(("torch._dynamo", "torch._compile"))


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether hooks get the gradient of a parameter (``_backward_hooks``): those of ``register_hook``."""
    return bool(parameter._backward_hooks)


def other_saved_tensor_hooks() -> bool:
    """Whether default saved-tensor hooks are in force: those of activation checkpointing, say."""
    return _top_saved_tensors_default_hooks(False) is not None


def inside_transform() -> bool:
    """Whether a transform of ``torch.func`` is running: ``vmap``, ``grad``, ``jvp`` or ``functionalize``."""
    return peek_interpreter_stack() is not None


def fake_tensor_mode() -> FakeTensorMode:
    """Return a context in which a model runs on tensors that have shapes but no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


# ------------------------------------------------------------------------------------------------------------- modules


HOOKS = frozenset(name for name in vars(nn.Module()) if "hooks" in name)
"""The attributes in which a module has its hooks."""


def read(module: nn.Module, name: str) -> Any:
    """Return a tensor of a module, as ``getattr`` does, but in a third of the time (``_parameters``, ``_buffers``)."""
    if name in module._parameters:
        return module._parameters[name]
    return module._buffers[name] if name in module._buffers else getattr(module, name)


COMPILED_CALL = "_compiled_call_impl"
"""The attribute in which ``module.compile()`` has put the compiled call, which is bound to the module."""


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled by itself: in place, by ``module.compile()``."""
    return module._compiled_call_impl is not None


def watches_output(module: nn.Module) -> bool:
    """Whether hooks of a module see what it puts out, or the gradient of that."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def watches_input(module: nn.Module) -> bool:
    """Whether hooks of a module see what it gets, or the gradient of that."""
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def changes_input(module: nn.Module) -> bool:
    """Whether hooks of a module run before it, and may change what it gets, or itself (``_forward_pre_hooks``)."""
    return bool(module._forward_pre_hooks)


def load_as(plain: type[nn.Module], module: nn.Module, *args: Any) -> None:
    """Load a module's part of a ``state_dict`` as its plain class does (``_load_from_state_dict``).

    The module is of that class meanwhile: the method may call ``super()``.
    """
    swapped, module.__class__ = type(module), plain  # type: ignore[assignment]
    try:
        module._load_from_state_dict(*args)
    finally:
        module.__class__ = swapped  # type: ignore[assignment]


def compiled_by_lightning(module: nn.Module) -> dict[str, Any]:
    """Return what Lightning remembers of a LightningModule that it has compiled; empty for every other module.

    In the attribute ``_compiler_ctx`` it has the methods before they were compiled, under ``"original_"`` and the name
    of the method. The compiled ones are attributes of the module and bound to it, so a copy must not have them.
    """
    remembered: dict[str, Any] = module.__dict__.get("_compiler_ctx") or {}
    return remembered
