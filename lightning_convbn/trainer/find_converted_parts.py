"""Which parts of a LightningModule are converted: the callback's argument ``target``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import permutations
from typing import cast

from torch import nn

from lightning_convbn.layers.state import Recompute
from lightning_convbn.layers.supported_layers import is_norm
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.lightning_api import LightningModule


def checked_paths(target: object) -> list[str] | None:
    """Return the argument ``target`` as a list of paths, or None if it is None.

    Raises:
        ValueError: If it is neither a path nor a sequence of paths.
    """
    paths = [target] if isinstance(target, str) else target
    if paths is None:
        return None
    if not (isinstance(paths, Sequence) and paths and all(isinstance(path, str) and path for path in paths)):
        raise ValueError(f"target must be one or more attribute paths such as 'backbone'; got {target!r}")
    return list(paths)


def find_parts(
    pl_module: LightningModule,
    target: Sequence[str] | None,
    *,
    recompute: Recompute,
) -> list[ConvertedPart]:
    """Find the parts that ``target`` names, without changing them. What has two names, or lies within another, is one.

    Args:
        pl_module: The LightningModule.
        target: Paths of the parts; None for the default.
        recompute: As for `ConvertedPart`.

    Raises:
        ValueError: If there is no such part, if it has no BatchNorm, or if it lies within another part.
    """
    paths = target or _default_paths(pl_module)
    modules = {path: _part(pl_module, path) for path in paths}
    path_of = {module: path for path, module in reversed(modules.items())}  # a module of two names is one part
    inside = {
        inner: outer for outer, inner in permutations(path_of, 2) if any(inner is module for module in outer.modules())
    }
    nested = [(path_of[inner], path_of[outer]) for inner, outer in inside.items()]
    for within, around in [*nested, *((path, path) for path in modules if paths.count(path) > 1)] if target else ():
        raise ValueError(f"target={target!r}: {within!r} lies within {around!r}; name one of them")
    return [
        ConvertedPart(path, module, recompute=recompute)
        for path, module in modules.items()
        if path_of[module] == path and module not in inside
    ]


def _part(pl_module: LightningModule, path: str) -> nn.Module:
    try:
        module: nn.Module = pl_module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"target={path!r}: {_what_is_missing(pl_module, path)}") from None
    if not _has_norm(module):
        raise ValueError(
            f"target={path or None!r}: {type(module).__name__} has no BatchNorm; name the part that has, or leave "
            "ConvBNModeCallback out"
        )
    return module


def _what_is_missing(pl_module: LightningModule, path: str) -> str:
    """Say up to where a path that leads to no module can be followed, and what is there."""
    names, depth, module = path.split("."), 0, cast(nn.Module, pl_module)
    while isinstance(child := getattr(module, names[depth], None), nn.Module):
        module, depth = child, depth + 1
    children = [name for name, _ in module.named_children()]
    place = f"{'.'.join(names[:depth])!r} ({type(module).__name__})" if depth else type(module).__name__
    close = difflib.get_close_matches(names[depth], children, n=1)
    hint = f"did you mean {'.'.join([*names[:depth], *close, *names[depth + 1 :]])!r}? " if close else ""
    there = f"its modules are {', '.join(map(repr, children))}" if children else "it has no modules"
    return f"{place} has no module {names[depth]!r}; {hint}{there}"


def _default_paths(pl_module: LightningModule) -> list[str]:
    """Return ``backbone`` if it has a BatchNorm, else every child that has one.

    If a BatchNorm is an attribute of the LightningModule itself, the whole LightningModule is converted. Otherwise we
    take the children: they can be watched even if ``training_step`` calls them without the LightningModule's forward.
    """
    children = {name: child for name, child in pl_module.named_children() if _has_norm(child)}
    if "backbone" in children:
        return ["backbone"]
    return [""] if any(map(is_norm, children.values())) else [*children] or [""]


def _has_norm(module: nn.Module) -> bool:
    return any(map(is_norm, module.modules()))
