"""Converts the modules of a model, and restores them: what each module becomes in a mode.

`modes.py` has checked the arguments, except for what only the model shows: that is checked here, before any swap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from torch import nn

from lightning_convbn.blocks.find import find_blocks, why_not
from lightning_convbn.blocks.recomputed import recomputed_class
from lightning_convbn.layers.norms import unknown_norm
from lightning_convbn.layers.supported_layers import conv_layer, is_norm, norm_layer
from lightning_convbn.layers.swap import (
    Mode,
    Recompute,
    class_name,
    partners_of,
    plain_class,
    restore_class,
    swap_class,
    swap_of,
)
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.find import mismatch, statistics_missing
from lightning_convbn.pairs.pair import ConvBNPairs


def restore_modules(modules: Iterable[nn.Module]) -> None:
    """Give back plain modules, wherever they are now. Does nothing to a plain module."""
    chosen = set(modules)
    _part_from_others(chosen)
    for module in chosen:
        restore_class(module)


def _part_from_others(chosen: Set[nn.Module]) -> None:
    """Let the partners of modules that lie outside of them compute the right thing on their own.

    Such a convolution becomes plain, and such a BatchNorm is frozen. There are some if a part of a converted model is
    switched, or if modules were replaced.
    """
    for module in chosen:
        for partner in partners_of(module):
            if partner not in chosen and module in partners_of(partner):  # else it has another partner by now
                _leave_pair(partner)


def _leave_pair(module: nn.Module) -> None:
    """Let a convolution or a BatchNorm of a pair run alone, in the mode that it is in."""
    swap = swap_of(module)
    if swap is not None and is_norm(module):
        swap_class(module, _frozen_class(module), swap.mode, reason=reasons.TORN)
    else:
        restore_class(module)


def convert(model: nn.Module, mode: Mode, pairs: ConvBNPairs, recompute: Recompute | Sequence[str]) -> None:
    """Check everything first, then swap: bad input never leaves a model half converted.

    Args:
        model: Any module, in any mode.
        mode: Its mode from now on: any but ``"train"``.
        pairs: What to fold.
        recompute: As for `set_mode`.

    Raises:
        ValueError: If ``pairs`` or ``recompute`` names what does not fit the model.
    """
    conv_of = _checked_partners(model, pairs)
    blocks = _checked_blocks(model, pairs, recompute)
    classes = {name: recomputed_class(plain_class(model.get_submodule(name))) for name in blocks}  # type: ignore[arg-type]
    level: Recompute = recompute if recompute in ("none", "elementwise") else "blocks"  # type: ignore[assignment]
    _part_from_others(set(model.modules()))
    folded_convs = set() if mode == "eval" else set(conv_of.values())
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_norm(module):
            _convert_norm(name, module, mode, pairs, conv_of.get(module), level)
        elif module not in folded_convs:
            restore_class(module)
    for conv_name, bn_name in pairs if mode != "eval" else ():
        row = conv_layer(modules[conv_name])
        assert row is not None
        cls = row.tune if mode == "tune" else row.deploy
        reshaped = pairs.reshaped.get(bn_name, 0)
        swap_class(modules[conv_name], cls, mode, bn=modules[bn_name], reshaped=reshaped)
    for name, recomputed in classes.items():
        swap_class(modules[name], recomputed, mode)


def _convert_norm(
    name: str, bn: nn.Module, mode: Mode, pairs: ConvBNPairs, conv: nn.Module | None, recompute: Recompute
) -> None:
    """Freeze or fold a BatchNorm, or restore one that stays unfrozen."""
    if name in pairs.unfrozen or statistics_missing(bn) is not None:
        restore_class(bn)
    elif conv is None:
        swap_class(bn, _frozen_class(bn), mode, recompute=recompute, reason=pairs.unpaired.get(name, reasons.NOT_GIVEN))
    else:
        row = norm_layer(bn)
        assert row is not None
        cls = _frozen_class(bn) if mode == "eval" else row.folded
        swap_class(bn, cls, mode, conv=conv, reshaped=pairs.reshaped.get(name, 0), recompute=recompute)


def _frozen_class(bn: nn.Module) -> type[nn.Module]:
    """Return what freezes a BatchNorm without folding it."""
    row = norm_layer(bn)
    if row is None or row.eval is None or "forward" in vars(bn):  # the forward may be one that was set on the module
        return unknown_norm(plain_class(bn))  # type: ignore[arg-type]
    return row.eval


def _checked_blocks(model: nn.Module, pairs: ConvBNPairs, recompute: Recompute | Sequence[str]) -> Sequence[str]:
    """Return the names of the blocks that are to run again in the backward pass.

    Raises:
        ValueError: If a block that was named does not exist, or can't run again.
    """
    if isinstance(recompute, str):
        return find_blocks(model, pairs).names if recompute == "blocks" else ()
    modules = dict(model.named_modules())
    for name in recompute:
        if name not in modules:
            raise ValueError(f"recompute: {type(model).__name__} has no module `{name}`")
        if not any(modules[name].children()) or is_norm(modules[name]):
            raise ValueError(f"recompute: `{name}` is a {class_name(modules[name])}, a layer; name a block of layers")
        reason = why_not(model, name, pairs)
        if reason is not None:
            raise ValueError(f"recompute: `{name}` can't run again in the backward pass: it {reason}")
    return recompute


def _checked_partners(model: nn.Module, pairs: ConvBNPairs) -> dict[nn.Module, nn.Module]:
    """Return the convolution of each BatchNorm in a pair.

    Raises:
        ValueError: If a pair does not fit the model.
    """
    modules = dict(model.named_modules())
    conv_of: dict[nn.Module, nn.Module] = {}
    for conv_name, bn_name in pairs:
        for name in (conv_name, bn_name):
            if name not in modules:
                raise ValueError(f"pairs: {type(model).__name__} has no module `{name}`")
        reason = unfit(model, conv_name, bn_name)
        if reason is not None:
            raise ValueError(f"pairs: `{conv_name}` and `{bn_name}` can't be folded: {reason}")
        conv_of[modules[bn_name]] = modules[conv_name]
    if len(set(conv_of.values())) < len(pairs):
        raise ValueError("pairs: a convolution or a BatchNorm is in more than one pair")
    return conv_of


def unfit(model: nn.Module, conv_name: str, bn_name: str) -> str | None:
    """Return the reason why two modules of a model can't be folded; None if they can."""
    bn = model.get_submodule(bn_name)
    reason = f"`{bn_name}` is no BatchNorm" if not is_norm(bn) else statistics_missing(bn)
    return reason or mismatch(model, conv_name, bn_name)
