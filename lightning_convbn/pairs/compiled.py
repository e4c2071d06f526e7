"""Compiled units: the modules of which a compiler makes graphs of their own."""

from __future__ import annotations

from torch import nn

from lightning_convbn.compat import is_compiled
from lightning_convbn.pairs.fsdp import innermost


def is_compiled_unit(module: nn.Module) -> bool:
    """Whether a module is compiled by itself: in place, or wrapped by ``torch.compile(module)``."""
    return is_compiled(module) or is_wrapped_by_compile(module)


def is_wrapped_by_compile(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile(module)`` returns."""
    # We compare class names: importing the class takes long.
    return any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__)


def compiled_unit(model: nn.Module, name: str) -> str | None:
    """Return the qualified name of the innermost compiled unit around a module, or None if there is none in the model.

    A module that is a unit itself is its own innermost unit.

    Args:
        model: The model.
        name: Qualified name of the module within it.
    """
    return innermost(model, name, is_compiled_unit)
