"""Every private name of PyTorch and Lightning that the package uses, so that a new release breaks one file.

No other file of the package has a private name. `docs/contributing/private-names.md` lists what stands here: why, what
breaks without it, and since which version it is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import _assert as assert_in_graph
from torch._C import DisableTorchFunctionSubclass as without_torch_function
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as outside_fake_mode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules import module as of_all_modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = [  # what is only passed on; what is defined here can be imported without
    "FakeTensor",
    "TorchDispatchMode",
    "assert_in_graph",
    "outside_fake_mode",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "without_modes",
    "without_torch_function",
]

# ------------------------------------------------------------------------------------------------ autograd and tensors

DelayedError = torch._C._functions.DelayedError
"""``DelayedError(message, 1)`` returns a function that gives a tensor an autograd node which raises this message."""


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place (``_version``); None for an inference tensor, which does not count."""
    return None if tensor.is_inference() else tensor._version


def versions_of(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """How often tensors were written in place, and where parameters lie: ``.data = ...`` moves them.

    None if writes to one of them are not counted, as in inference mode.
    """
    try:
        return tuple([number for tensor in tensors for number in (tensor._version, _address(tensor))])
    except RuntimeError:
        return None


def versions_in_call(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, ...] | None:
    """The same of an input and parameters. Each forward of a pair asks, so it is written out."""
    try:
        if bias is None:
            return input._version, weight._version, _address(weight)
        return input._version, weight._version, _address(weight), bias._version, _address(bias)
    except RuntimeError:
        return None


def _address(tensor: Tensor) -> int:
    """Where a parameter lies. Of other tensors nobody replaces the data, and some have none."""
    return tensor.data_ptr() if type(tensor) is nn.Parameter else 0


def saved_by(node: Any, name: str) -> Tensor | None:
    """Return the tensor that a node of the autograd graph has saved under a name; None if there is none."""
    return getattr(node, f"_saved_{name}", None)


_RAW = "_raw_saved_"


def replace_saved(node: Any, name: str, recipe: Callable[[Any], Tensor]) -> bool:
    """Have a node of the autograd graph keep a recipe in the place of a tensor that it has saved.

    Args:
        node: A ``grad_fn``.
        name: What the node calls the tensor: ``weight`` of its attribute ``_raw_saved_weight``.
        recipe: Computes the tensor, whatever it is given. It must not hold ``node``.

    Returns:
        Whether the recipe is in place. It is not if the node has saved nothing there or is of another kind, as those
        behind a subclass of Tensor; nor if other saved-tensor hooks (activation checkpointing, ``save_on_cpu``) hold
        the tensor: each saved tensor takes one pair of hooks.
    """
    try:
        # `id` packs the tensor: the hook must return something, and the recipe needs nothing of it.
        getattr(node, _RAW + name).register_hooks(id, recipe)
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


def pack_hook() -> Any:
    """Return the default hook in force that packs saved tensors; None if there is none, and in a compiler's graph."""
    hooks = None if torch.compiler.is_compiling() else _top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent of forward-mode AD. Hardly anybody uses it, so we look if a level is open."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_any_autocast_on() -> bool:
    """Whether autocast is on for a device: asked in each forward of a pair, where it is hardly ever on."""
    return torch._C._is_any_autocast_enabled()


def is_in_backward() -> bool:
    """Whether autograd's engine is running a backward pass now, in this thread."""
    return torch._C._current_graph_task_id() != -1


def is_jit_traced() -> bool:
    """Whether ``torch.jit.trace`` is running."""
    return torch._C._get_tracing_state() is not None


def in_graph() -> bool:
    """Whether a graph is being made of the model, by a compiler or by a trace."""
    if torch.compiler.is_compiling() or is_jit_traced():
        return True
    has_modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return bool(has_modes) and get_proxy_mode() is not None


def inside_transform() -> bool:
    """Whether a transform of ``torch.func`` is running: ``vmap``, ``grad``, ``jvp`` or ``functionalize``."""
    return peek_interpreter_stack() is not None


def fake_tensor_mode() -> FakeTensorMode:
    """Return a context in which a model runs on tensors that have shapes but no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


# ------------------------------------------------------------------------------------------------------------- modules


HOOKS = frozenset(name for name in vars(nn.Module()) if "hooks" in name)
"""The attributes in which a module has its hooks."""


def tensors_of_pair(conv: nn.Module, bn: nn.Module) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Return a convolution's weight and bias, and a BatchNorm's weight, bias, running mean and running variance.

    As ``getattr`` does, but in a third of the time (``_parameters``, ``_buffers``).
    """
    parameters, affine, buffers = conv._parameters, bn._parameters, bn._buffers
    if "weight" in parameters and "bias" in parameters and "weight" in affine and "bias" in affine:
        mean, var = buffers.get("running_mean"), buffers.get("running_var")
        if mean is not None and var is not None:
            return parameters["weight"], parameters["bias"], affine["weight"], affine["bias"], mean, var
    names = ("weight", "bias", "running_mean", "running_var")  # a weight may be computed whenever it is read
    return conv.weight, conv.bias, *(getattr(bn, name) for name in names)  # type: ignore[return-value]


def versions_of_affine(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor) -> tuple[int, ...] | None:
    """How often what a BatchNorm multiplies and adds was written. Each forward of a pair asks twice: written out."""
    try:
        if weight is None or bias is None:
            return mean._version, var._version, *(tensor._version for tensor in (weight, bias) if tensor is not None)
        return mean._version, var._version, weight._version, bias._version
    except RuntimeError:
        return None


def has_affine(bn: nn.Module, weight: Any, bias: Any, mean: Any, var: Any) -> bool:
    """Whether a BatchNorm still holds these tensors (``_parameters``, ``_buffers``). Computed ones don't count."""
    parameters, buffers = bn._parameters, bn._buffers
    return (
        parameters.get("weight", weight) is weight
        and parameters.get("bias", bias) is bias
        and buffers.get("running_mean", mean) is mean
        and buffers.get("running_var", var) is var
    )


def has_statistics(module: nn.Module) -> bool:
    """Whether a module of Python has the buffers ``running_mean`` and ``running_var`` (``_buffers``)."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    buffers = module._buffers
    return buffers.get("running_mean") is not None and buffers.get("running_var") is not None


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


def is_watched(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether somebody sees what passes from a convolution to its BatchNorm, or the gradient of that.

    Hooks of the two do, and so do hooks of all modules (``register_module_forward_hook``, ``FlopCounterMode``). A
    compiler does that was given one of the two alone, by ``module.compile()``. Each forward of a pair asks.
    """
    return bool(
        watches_output(conv)
        or watches_input(bn)
        or conv._compiled_call_impl
        or bn._compiled_call_impl
        or (of_all_modules._global_forward_hooks and _see(of_all_modules._global_forward_hooks))
        or (of_all_modules._global_forward_pre_hooks and _see(of_all_modules._global_forward_pre_hooks))
        or of_all_modules._global_backward_hooks
        or of_all_modules._global_backward_pre_hooks
    )


def _see(hooks: dict[int, Any]) -> bool:
    """Whether hooks look at what modules put out. Those of a count of bytes note which module runs, and are marked."""
    return not all(hasattr(hook, "sees_no_tensors") for hook in hooks.values())


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Call no hooks of all modules (``register_module_forward_hook`` and the like) in a ``with`` block."""
    places = [value for name, value in vars(of_all_modules).items() if name.startswith("_global") and "hooks" in name]
    with with_hooks([(place, {}) for place in places]):
        yield


Hooks = list[tuple["OrderedDict[int, Any]", dict[int, Any]]]


def hooks_of(modules: Iterable[nn.Module]) -> Hooks:
    """Return where modules have their hooks, and which are there now."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    places = (getattr(module, name) for module in modules for name in names)
    return [(place, dict(place)) for place in places]


@contextmanager
def with_hooks(hooks: Hooks) -> Iterator[None]:
    """Have the hooks that `hooks_of` has returned, and no others, in a ``with`` block."""
    now = [dict(place) for place, _ in hooks]
    _put(hooks)
    try:
        yield
    finally:
        _put([(place, before) for (place, _), before in zip(hooks, now, strict=True)])


def _put(hooks: Iterable[tuple[OrderedDict[int, Any], dict[int, Any]]]) -> None:
    for place, wanted in hooks:
        if place != wanted:
            place.clear()
            place.update(wanted)


def changes_input(module: nn.Module) -> bool:
    """Whether hooks of a module run before it, and may change what it gets, or itself (``_forward_pre_hooks``)."""
    return bool(module._forward_pre_hooks)


def compiled_by_lightning(module: nn.Module) -> dict[str, Any]:
    """Return what Lightning remembers of a LightningModule that it has compiled; empty for every other module.

    In the attribute ``_compiler_ctx`` it has the methods before they were compiled, under ``"original_"`` and the name
    of the method. The compiled ones are attributes of the module and bound to it, so a copy must not have them.
    """
    remembered: dict[str, Any] = module.__dict__.get("_compiler_ctx") or {}
    return remembered
