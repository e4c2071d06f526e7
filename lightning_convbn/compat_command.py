"""The private names of PyTorch and Lightning that `memory.py`, `exporting/` and `command/` use.

A new release of PyTorch or Lightning may rename them. Then this file changes, and nothing else does. Each docstring
says which name is private, why it is used, what breaks without it, and since which version it exists.
"""

# ---------------------------------------------------------------- used by memory.py, exporting/ and command/

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "compiled_by_lightning",
    "fake_tensor_mode",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
]

# Private: `torch.utils._python_dispatch.TorchDispatchMode`, since PyTorch 1.13.
# Why: a subclass sees every operation of ATen. `memory.py` finds in this way which storages a forward pass allocates.
# What breaks without it: every count of kept bytes. PyTorch documents the class, but only under this private module.


def fake_tensor_mode() -> FakeTensorMode:
    """Return a context in which a model runs on tensors that have shapes but no data.

    Private: ``torch._subclasses.FakeTensorMode``, since PyTorch 1.13. PyTorch's docs use this import, too.
    Why: kept bytes can be counted without memory and without computing.
    What breaks without it: `measure_memory_abstractly` has to run the model on real data.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def tree_leaves(tree: Any) -> list[Any]:
    """List everything that nested lists, tuples and dictionaries hold.

    Private: ``torch.utils._pytree``, since PyTorch 1.8; this function since 2.2.
    Why: the arguments and the output of a forward may be nested, and classes that a library registers there count, too.
    What breaks without it: models with nested arguments or outputs.
    """
    return _pytree.tree_leaves(tree)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the same nested containers with ``function(leaf)`` in the place of each leaf.

    Private: ``torch.utils._pytree``; see `tree_leaves`.
    """
    return _pytree.tree_map(function, tree)


def tree_map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the same nested containers with ``function(leaf)`` in the place of each leaf of a class.

    Private: ``torch.utils._pytree``; see `tree_leaves`.
    """
    return _pytree.tree_map_only(kind, function, tree)


def compiled_by_lightning(module: nn.Module) -> dict[str, Any]:
    """Return what Lightning remembers of a LightningModule that it has compiled; empty for every other module.

    Private: the attribute ``_compiler_ctx``, since Lightning 2.0. Its keys are ``"compiler"`` and, for each compiled
    method, ``"original_"`` and the name of the method; the values are the methods before they were compiled.
    Why: the compiled methods are attributes of the module, and they are bound to this module. A copy must not have
    them. Lightning's public ``to_uncompiled`` changes the module itself.
    What breaks without it: a copy of a compiled LightningModule calls the original instead of itself.
    """
    remembered: dict[str, Any] = module.__dict__.get("_compiler_ctx") or {}
    return remembered
