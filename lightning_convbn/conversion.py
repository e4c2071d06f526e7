"""Converts the modules of a model, and restores them: what each module becomes in a mode.

`modes.py` has checked the arguments. What only the model shows is checked here, before anything changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from torch import nn

from lightning_convbn.blocks.find import find_blocks, why_not
from lightning_convbn.blocks.recomputed import Block, block_forward
from lightning_convbn.layers.folded import conv_forward, norm_forward
from lightning_convbn.layers.norms import frozen_forward, reset_running_stats, train, unfrozen_forward
from lightning_convbn.layers.state import (
    Frozen,
    Mode,
    Pair,
    Recompute,
    TrainingFlag,
    Unfrozen,
    attach,
    detach,
    pair_of,
    state_of,
)
from lightning_convbn.layers.supported_layers import conv_layer, is_norm, norm_layer
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.find import mismatch, statistics_missing
from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs


def restore_modules(modules: Iterable[nn.Module]) -> None:
    """Give back plain modules, wherever they are now. Does nothing to a plain module."""
    chosen = set(modules)
    _part_from_others(chosen)
    for module in chosen:
        _restore(module)


def _restore(module: nn.Module) -> None:
    """Give back a plain module, with the training flag that was asked for last."""
    flag = _flag_of(module)
    detach(module)
    if flag is not None:
        module.training = module.training or flag.value()


def _part_from_others(chosen: Set[nn.Module]) -> None:
    """Let the partners of modules that lie outside of them compute the right thing on their own.

    Such a convolution becomes plain, and such a BatchNorm is frozen. There are some if a part of a converted model is
    switched, or if modules were replaced.
    """
    for module in chosen:
        pair = pair_of(module)
        if pair is None:
            continue
        if pair.conv not in chosen and pair_of(pair.conv) is pair:
            detach(pair.conv)
        if pair.bn not in chosen and pair_of(pair.bn) is pair:
            _freeze(pair.bn, pair.mode, pair.recompute, reasons.TORN, pair.flag)


def _flag_of(module: nn.Module) -> TrainingFlag | None:
    """The training flag that a converted BatchNorm was asked to have; None for any other module."""
    state = state_of(module)
    return state.flag if isinstance(state, (Frozen, Pair)) and is_norm(module) else None


def _freeze(bn: nn.Module, mode: Mode, recompute: Recompute, reason: str, flag: TrainingFlag) -> None:
    """Freeze a BatchNorm without folding it."""
    attach(bn, Frozen(mode, recompute, reason, flag), {**FREEZING, "forward": frozen_forward})
    bn.training = False


FREEZING: dict[str, Callable[..., Any]] = {"train": train, "reset_running_stats": reset_running_stats}


def convert(model: nn.Module, mode: Mode, pairs: ConvBNPairs, recompute: Recompute | Sequence[str]) -> None:
    """Check everything first, then convert: bad input never leaves a model half converted.

    Args:
        model: Any module, in any mode.
        mode: Its mode from now on. In ``"train"`` no BatchNorm is frozen.
        pairs: What to fold.
        recompute: As for `set_mode`.

    Raises:
        ValueError: If ``pairs`` or ``recompute`` names what does not fit the model.
    """
    conv_of = _checked_partners(model, pairs)
    blocks = _checked_blocks(model, () if mode == "train" else pairs, recompute)  # Train mode folds no pair
    level: Recompute = recompute if recompute in ("none", "elementwise") else "blocks"  # type: ignore[assignment]
    try:
        _convert(model, mode, pairs, conv_of, blocks, level)
    except BaseException:  # such as Ctrl-C, or a module of the user that refuses an attribute
        restore_modules(model.modules())
        raise


def _convert(
    model: nn.Module,
    mode: Mode,
    pairs: ConvBNPairs,
    conv_of: Mapping[nn.Module, nn.Module],
    blocks: Sequence[str],
    level: Recompute,
) -> None:
    """Convert the modules of a model: the arguments fit it."""
    running = {name: state_of(model.get_submodule(name)) for name in blocks}
    _part_from_others(set(model.modules()))
    for name, module in list(model.named_modules()):
        if not is_norm(module):
            if module not in conv_of.values() or mode in ("train", "eval"):
                detach(module)
        elif mode == "train" or name in pairs.unfrozen or statistics_missing(module) is not None:
            _restore(module)
            if level != "none" and statistics_missing(module) != reasons.LAZY:
                attach(module, Unfrozen(mode, level), {"forward": unfrozen_forward})
        else:
            parent = model.get_submodule(name.rpartition(".")[0]) if name else None
            flag = _flag_of(module) or TrainingFlag(parent, module.training)
            if module in conv_of:
                _pair(conv_of[module], module, mode, level, flag)
            else:
                _freeze(module, mode, level, pairs.unpaired.get(name, reasons.NOT_GIVEN), flag)
    for name in blocks:
        state = running[name]
        if not isinstance(state, Block) or state.mode != mode:
            state = Block(mode, level)
        attach(model.get_submodule(name), state, {"forward": block_forward})


def _pair(conv: nn.Module, bn: nn.Module, mode: Mode, recompute: Recompute, flag: TrainingFlag) -> None:
    """Fold a BatchNorm into its convolution, or, in Eval mode, freeze it and remember the pair.

    A pair that is in force already keeps its state, so that a compiled model need not be compiled anew.
    """
    pair = pair_of(bn)
    if pair is None or pair.conv is not conv:
        pair = Pair(conv, bn, conv_layer(conv), norm_layer(bn), flag)
    pair.mode, pair.recompute, pair.fold, pair.keeps_fold = mode, recompute, None, True
    attach(bn, pair, {**FREEZING, "forward": norm_forward})
    bn.training = False
    if mode != "eval":
        attach(conv, pair, {"forward": conv_forward})


def keep_no_fold(model: nn.Module) -> None:
    """Have a model in Deploy mode fold in every pass, until the next switch.

    A kept fold does not see a write that PyTorch does not count, such as an average of weights that is put in place
    through ``.data`` for a part of an evaluation.
    """
    for module in model.modules():
        pair = pair_of(module)
        if pair is not None:
            pair.keeps_fold = False


def _checked_blocks(
    model: nn.Module, pairs: Iterable[ConvBNPair], recompute: Recompute | Sequence[str]
) -> Sequence[str]:
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
            raise ValueError(
                f"recompute: `{name}` is a {type(modules[name]).__name__}, a layer; name a block of layers"
            )
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
