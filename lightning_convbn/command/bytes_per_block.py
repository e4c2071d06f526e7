"""Adds up the kept bytes by block and by section.

A block is a convolution with its BatchNorm, or any other module. A section is all blocks that share the first part of
their name, such as ``layer1``. A section that holds more than half of all bytes is divided by the next part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

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
    bn_of = {pair.conv: pair.bn for pair in pairs} | {pair.bn: pair.bn for pair in pairs}
    conv_of = {pair.bn: pair.conv for pair in pairs}
    modules = dict(model.named_modules())
    sums: dict[str, dict[Variant, int]] = {}
    for variant, sizes in by_module.items():
        for name, size in sizes.items():
            key = next((bn_of[outer] for outer in _from_innermost(name) if outer in bn_of), name)
            sums.setdefault(key, dict.fromkeys(by_module, 0))[variant] += size
    order = {name: number for number, name in enumerate([INPUT, *modules])}
    first = {key: conv_of.get(key, key) for key in sums}
    sections = _sections({first[key]: max(sizes.values()) for key, sizes in sums.items()})
    return [
        Block(
            name=_label(key, conv_of),
            section=sections[first[key]] or OWN_FORWARD,
            about=_about(key, modules, pairs, conv_of),
            saved_bytes=sums[key],
        )
        for key in sorted(sums, key=lambda key: order[first[key]])
    ]


def sum_by_section(blocks: Sequence[Block], variants: Sequence[Variant]) -> list[Block]:
    """Add up the blocks of each section."""
    members: dict[str, list[Block]] = {}
    for block in blocks:
        members.setdefault(block.section, []).append(block)
    return [
        Block(
            name=section,
            section=section,
            about=f"{len(within)} block{'s' * (len(within) > 1)}",
            saved_bytes={variant: sum(block.saved_bytes[variant] for block in within) for variant in variants},
        )
        for section, within in members.items()
    ]


def _from_innermost(name: str) -> list[str]:
    """Return a qualified name and the names of the modules around it. The innermost is first."""
    words = name.split(".")
    return [".".join(words[:length]) for length in range(len(words), 0, -1)]


def _label(key: str, conv_of: Mapping[str, str]) -> str:
    if key not in conv_of:
        return key or OWN_FORWARD
    conv = conv_of[key]
    (conv_parent, _, _), (bn_parent, _, bn_name) = conv.rpartition("."), key.rpartition(".")
    return f"{conv} + {bn_name if conv_parent == bn_parent else key}"


def _about(key: str, modules: Mapping[str, nn.Module], pairs: ConvBNPairs, conv_of: Mapping[str, str]) -> str:
    if key not in modules:
        return "the batch itself"
    described = type(modules[key]).__name__
    if key in conv_of:
        return f"{type(modules[conv_of[key]]).__name__} and {described}, folded"
    if key in pairs.unpaired:
        return f"{described}, {'unfrozen' if key in pairs.unfrozen else 'frozen'}: {pairs.unpaired[key]}"
    return described


def _sections(sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the section of each qualified name."""
    depths = dict.fromkeys(sizes, 1)
    while True:
        sections = {name: ".".join(name.split(".")[:depth]) for name, depth in depths.items()}
        totals: Counter[str] = Counter()
        for name, section in sections.items():
            totals[section] += sizes[name]
        large = {section for section, total in totals.items() if 2 * total > sum(sizes.values())}
        divisible = [name for name, section in sections.items() if section in large and name != section]
        if not divisible:
            return sections
        for name in divisible:
            depths[name] += 1
