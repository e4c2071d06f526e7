"""FSDP units: the modules for whose forward FSDP gathers parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# We compare class names. Importing the classes takes long, and only a model that uses them needs them.
_FSDP = {"FSDPModule", "FullyShardedDataParallel"}


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether FSDP gathers the parameters of a module for its forward, except those of units inside of it."""
    return any(cls.__name__ in _FSDP for cls in type(module).__mro__)


def fsdp_unit(model: nn.Module, name: str) -> str | None:
    """Return the qualified name of the innermost FSDP unit around a module, or None if there is none in the model.

    A module that is a unit itself is its own innermost unit.

    Args:
        model: The model.
        name: Qualified name of the module within it.
    """
    return innermost(model, name, is_fsdp_unit)


def innermost(model: nn.Module, name: str, wanted: Callable[[nn.Module], bool]) -> str | None:
    """Return the qualified name of the innermost module that is wanted, of a module and those around it, or None.

    Args:
        model: The model.
        name: Qualified name of the module within it.
        wanted: Says whether a module is.
    """
    while True:
        if wanted(model.get_submodule(name)):
            return name
        if not name:
            return None
        name = name.rpartition(".")[0]
