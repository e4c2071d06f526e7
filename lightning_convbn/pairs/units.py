"""Units: the modules for whose forward FSDP gathers parameters, or of which a compiler makes graphs of their own.

A pair can only be folded if both of its layers lie in the same unit of each kind. We compare names of classes, because
importing the classes takes long, and only a model that uses them needs them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_convbn.compat import is_compiled

_FSDP = {"FSDPModule", "FullyShardedDataParallel"}


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether FSDP gathers the parameters of a module for its forward, except those of units inside of it."""
    return any(cls.__name__ in _FSDP for cls in type(module).__mro__)


def is_compiled_unit(module: nn.Module) -> bool:
    """Whether a module is compiled by itself: in place, or wrapped by ``torch.compile(module)``."""
    return is_compiled(module) or is_wrapped_by_compile(module)


def is_wrapped_by_compile(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile(module)`` returns."""
    return any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__)


def innermost_unit(model: nn.Module, name: str, is_unit: Callable[[nn.Module], bool]) -> str | None:
    """Return the qualified name of the innermost unit around a module, or None if there is none in the model.

    A module that is a unit itself is its own innermost unit.

    Args:
        model: The model.
        name: Qualified name of the module within it.
        is_unit: Says whether a module is a unit: `is_fsdp_unit` or `is_compiled_unit`.
    """
    while True:
        if is_unit(model.get_submodule(name)):
            return name
        if not name:
            return None
        name = name.rpartition(".")[0]
