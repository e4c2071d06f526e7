"""Adds up the kept bytes by block. A block is a convolution with its BatchNorm, or any other module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_convbn.command.results import Block, Variant
from lightning_convbn.memory.live_storages import INPUT
from lightning_convbn.pairs.pair import ConvBNPairs

OWN_FORWARD = "(the model's own forward)"


def sum_by_block(model: nn.Module, pairs: ConvBNPairs, by_module: Mapping[Variant, Mapping[str, int]]) -> list[Block]:
    """Add up by block what each module keeps. The modules inside a convolution or a BatchNorm belong to its block.

    Args:
        model: The plain model.
        pairs: Its pairs.
        by_module: Variant -> qualified name of a module -> bytes. Each byte goes to exactly one block.

    Returns:
        The blocks that keep something in at least one variant, in the order of the model.
    """
    conv_of = {pair.bn: pair.conv for pair in pairs}
    block_of = {pair.conv: pair.conv for pair in pairs} | conv_of
    sums: dict[str, dict[Variant, int]] = {}
    for variant, sizes in by_module.items():
        for name, size in sizes.items():
            first = next((block_of[outer] for outer in _from_innermost(name) if outer in block_of), name)
            sums.setdefault(first, dict.fromkeys(by_module, 0))[variant] += size
    bn_of = {pair.conv: pair.bn for pair in pairs}
    ordered = [first for first in (INPUT, *dict(model.named_modules())) if first in sums]
    return [
        Block(_label(first, bn_of.get(first)), _about(first, bn_of.get(first), model, pairs), sums[first])
        for first in ordered
    ]


def _from_innermost(name: str) -> list[str]:
    """Return a qualified name and the names of the modules around it. The innermost is first."""
    words = name.split(".")
    return [".".join(words[:length]) for length in range(len(words), 0, -1)]


def _label(first: str, bn: str | None) -> str:
    if bn is None:
        return first or OWN_FORWARD
    (parent, _, _), (bn_parent, _, bn_name) = first.rpartition("."), bn.rpartition(".")
    return f"{first} + {bn_name if parent == bn_parent else bn}"


def _about(first: str, bn: str | None, model: nn.Module, pairs: ConvBNPairs) -> str:
    if first == INPUT:
        return "the batch itself"
    described = type(model.get_submodule(first)).__name__
    if bn is not None:
        return f"{described} and {type(model.get_submodule(bn)).__name__}, folded"
    if first in pairs.unpaired:
        return f"{described}, {'unfrozen' if first in pairs.unfrozen else 'frozen'}: {pairs.unpaired[first]}"
    return described
