"""Checks of two models, and of what a caller has given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fuzz.outcomes import Wrong
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_convbn.layers.supported_layers import is_norm


def raises(function: Callable[[], Any]) -> bool:
    """Whether a function raises."""
    try:
        function()
    except Exception:
        return True
    return False


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms of a model by their names."""
    return {name: module for name, module in model.named_modules() if is_norm(module)}


def inside_norm(model: nn.Module, name: str) -> bool:
    """Whether a module is a BatchNorm or a part of one."""
    parents = [name.rsplit(".", count)[0] for count in range(name.count(".") + 1)]
    return any(is_norm(model.get_submodule(parent)) for parent in parents)


def compare_modules(ours: nn.Module, twin: nn.Module) -> None:
    """Compare classes, attributes and hooks of all modules."""
    for (name, one), (_, other) in zip(ours.named_modules(), twin.named_modules(), strict=True):
        if type(one) is not type(other) and type(one).__name__ != type(other).__name__:
            raise Wrong("classes", f"`{name}` is {type(one).__name__}, not {type(other).__name__}")
        if vars(one).keys() != vars(other).keys():
            raise Wrong("classes", f"`{name}` has other attributes: {vars(one).keys() ^ vars(other).keys()}")
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            if len(getattr(one, hooks)) != len(getattr(other, hooks)):
                raise Wrong("classes", f"`{name}` has another number of {hooks}")


def compare_histories(ours: nn.Module, twin: nn.Module, when: str) -> None:
    """Compare how much the models have logged. What they have logged is compared after each run."""
    for (name, one), (_, other) in zip(ours.named_modules(), twin.named_modules(), strict=True):
        entries, expected = getattr(one, "history", []), getattr(other, "history", [])
        if len(entries) != len(expected) or not all(isinstance(entry, Tensor) for entry in entries):
            raise Wrong("history", f"{when}: `{name}` holds {entries}, not {expected}")


def compare_given(given: Any, unchanged: Any) -> None:
    """Raise `Wrong` if looking has changed the caller's objects."""
    (leaves, structure), (others, expected) = tree_flatten(given), tree_flatten(unchanged)
    if structure != expected:
        raise Wrong("looking", f"the inputs are {structure}, not {expected}")
    for leaf, other in zip(leaves, others, strict=True):
        if not isinstance(leaf, Tensor) or not torch.equal(leaf, other) or leaf.requires_grad != other.requires_grad:
            raise Wrong("looking", "an input was written")


def scramble(model: nn.Module) -> None:
    """Overwrite everything in a copy: the original must not notice."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
