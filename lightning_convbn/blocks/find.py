"""Finds the blocks of a model that can run again in the backward pass, and says why others can't."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from lightning_convbn.blocks import reasons
from lightning_convbn.blocks.recomputed import Block
from lightning_convbn.layers.state import Recompute, own_override, state_of
from lightning_convbn.layers.supported_layers import conv_layer, is_norm
from lightning_convbn.pairs.find import pairs_in_force
from lightning_convbn.pairs.pair import ConvBNPair, abbreviated, grouped
from lightning_convbn.pairs.units import is_compiled_unit, is_fsdp_unit

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LEAST_CONVOLUTIONS = 2  # what a single convolution reads is kept in any case


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model.

    Attributes:
        names: Qualified names of those that run again in the backward pass.
        left_out: Qualified name of a block that does not -> why.
    """

    names: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)

    def summary(self) -> list[str]:
        """Describe in a few lines what happens to the blocks; those with the same reason share a line."""
        total = len(self.names) + len(self.left_out)
        lines = [f"run again   {len(self.names):>4} of {total} blocks"]
        return lines + [
            f"  {len(names):>4} × {why}: {abbreviated(names)}" for why, names in grouped(self.left_out).items()
        ]


def find_blocks(model: nn.Module, pairs: Iterable[ConvBNPair]) -> Blocks:
    """Find the repeated blocks of a model.

    A block is a member of a ``Sequential``, ``ModuleList`` or ``ModuleDict``. It holds a BatchNorm, and two
    convolutions or more. Its class is repeated: somewhere two of them are next to each other. If a block holds blocks,
    it is a stage, and they are the blocks.

    Args:
        model: Any module, converted or not.
        pairs: Its pairs. No block may hold only one of the two layers.
    """
    modules = dict(model.named_modules())
    rows = [list(_members(name, module)) for name, module in modules.items() if isinstance(module, CONTAINERS)]
    neighbours = [(one, other) for row in rows for one, other in pairwise(row) if one is not None and other is not None]
    classes = [(type(modules[one]), type(modules[other])) for one, other in neighbours]
    repeated = {cls for cls, other in classes if cls is other}
    found = [name for row in rows for name in row if name is not None and type(modules[name]) in repeated]
    innermost = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    reason_for = {name: why_not(model, name, pairs) for name in innermost}
    left_out = {name: reason for name, reason in reason_for.items() if reason is not None}
    return Blocks(tuple(name for name in innermost if name not in left_out), left_out)


def recomputed_blocks(model: nn.Module) -> Blocks:
    """Return the blocks of a model that run again in the backward pass, and why others don't.

    Some reasons are only known when a block has run: see `look.py`.

    Args:
        model: A model that `set_mode` has put in a mode with ``recompute="blocks"``. Any other has none.

    Example:
        >>> import torchvision
        >>> from lightning_convbn import set_mode
        >>> model = torchvision.models.resnet18()
        >>> pairs = set_mode(model, "tune", recompute="blocks")
        >>> recomputed_blocks(model).names[:3]
        ('layer1.0', 'layer1.1', 'layer2.0')
    """
    if recompute_of(model) != "blocks":
        return Blocks()
    looks = {name: state.look for name, module in model.named_modules() if isinstance(state := state_of(module), Block)}
    left_out = {name: look.reason for name, look in looks.items() if look.reason is not None}
    refused = find_blocks(model, pairs_in_force(model) or ()).left_out
    return Blocks(tuple(name for name in looks if name not in left_out), {**left_out, **refused})


def recompute_of(model: nn.Module) -> Recompute:
    """Return what `set_mode` was told to recompute: the most of all parts."""
    states = (state_of(module) for module in model.modules())
    chosen: set[Recompute] = {state.recompute for state in states if state is not None}
    order: tuple[Recompute, ...] = ("blocks", "elementwise")
    return next((recompute for recompute in order if recompute in chosen), "none")


def why_not(model: nn.Module, name: str, pairs: Iterable[ConvBNPair]) -> str | None:
    """Return the reason why a block can't run again, as far as its modules show; None if it can."""
    block = model.get_submodule(name)
    inside = set(block.modules())
    if own_override(block) is not None:
        return reasons.OWN_FORWARD
    if isinstance(block, torch.jit.ScriptModule):
        return reasons.SCRIPTED
    if is_compiled_unit(block):
        return reasons.COMPILED
    if any(is_fsdp_unit(module) for module in inside):
        return reasons.SHARDED
    for conv, bn in pairs:
        if (model.get_submodule(conv) in inside) != (model.get_submodule(bn) in inside):
            return reasons.CROSSED.format(conv=conv, bn=bn)
    return None


def _members(parent: str, container: nn.Module) -> Iterator[str | None]:
    """Yield the names of the members of a container that may be blocks, and None for each other member."""
    for child, module in container.named_children():
        inside = set(module.modules())
        large = sum(conv_layer(layer) is not None for layer in inside) >= LEAST_CONVOLUTIONS
        fits = large and any(map(is_norm, inside)) and not isinstance(module, CONTAINERS)
        yield (f"{parent}.{child}" if parent else child) if fits else None
