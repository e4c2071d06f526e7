"""Switching a model between Train, Eval, Tune and Deploy mode, in place and exactly reversible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from typing import get_args

from torch import nn

from lightning_convbn.layers.norms import unknown_norm
from lightning_convbn.layers.swap import Mode, Recompute, partners_of, plain_class, restore_class, swap_class, swap_of
from lightning_convbn.layers.table import conv_layer, is_norm, is_scripted_norm, norm_layer
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.find import find_conv_bn_pairs, mismatch, pairs_in_force, statistics_missing
from lightning_convbn.pairs.pair import ConvBNPairs

MODES: tuple[Mode, ...] = get_args(Mode)
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
RECOMPUTING_MODES: tuple[Mode, ...] = ("eval", "tune")


def set_mode(
    model: nn.Module, mode: Mode, *, pairs: ConvBNPairs | None = None, recompute: Recompute = "none"
) -> ConvBNPairs:
    """Switch a model to a mode, in place, from whatever mode it is in.

    - ``"train"``: the modules exactly as they were found. This always succeeds, also for a part of a converted model,
      and after modules were replaced. A BatchNorm outside of the part is no longer folded if its convolution is plain.
    - ``"eval"``: every BatchNorm with running statistics is frozen at them, whoever calls ``.train()``.
    - ``"tune"``: as Eval, but paired BatchNorms are folded into their convolution at every forward. Gradients reach
      every parameter and equal Eval's. The convolution's own output is not kept for the backward pass. Nothing is
      cached from one forward to the next.
    - ``"deploy"``: as Tune, but folded once, at the first forward after the switch, for passes that need no gradient of
      a parameter. Where one is needed it runs as Tune does. The fold is made again after a write that PyTorch counts;
      a write through ``.data`` is noticed at the next switch.

    Parameters, buffers, training flags, ``state_dict`` keys, hooks and optimizers are not touched. A BatchNorm without
    running statistics stays unfrozen: it keeps running as it was found. A copy or a pickle of a converted model is
    plain. Its frozen BatchNorms have ``training=False``, until you call ``.train()`` on the copy.

    Args:
        model: Any module. Wrappers such as DDP are fine; ``DataParallel`` and a BatchNorm in TorchScript are not.
        mode: ``"train"``, ``"eval"``, ``"tune"`` or ``"deploy"``.
        pairs: What to fold; None for the pairs in force, or, in a plain model, for what `find_conv_bn_pairs` finds.
        recompute: ``"none"``, or, in Eval or Tune mode, ``"elementwise"``: what can be computed again, elementwise,
            from what is kept anyway is not kept for the backward pass. This goes for outputs of activations, products,
            frozen BatchNorms and concatenations, among others (`ops/elementwise.py`). The results are the same to the
            bit. Between the layers tensors are of a subclass of Tensor. Each call of `set_mode` decides anew.

    Returns:
        The pairs, and why every other BatchNorm is in none.

    Raises:
        ValueError: If an argument can't be used. The model is as it was.

    Source: arXiv 2305.11624, section 3.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> set_mode(model, "tune")
        ConvBNPairs([ConvBNPair(conv='0', bn='1')], unpaired={}, unfrozen=[])
        >>> model
        Sequential(
          (0): TuneConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): FoldedBatchNorm2d(8, eps=1e-05, momentum=0.1, ...)
        )
    """
    check_choice("mode", mode, MODES)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_recompute(mode, recompute)
    if mode == "train":
        found = pairs_in_force(model) if pairs is None else pairs
        restore_modules(model.modules())
        return find_conv_bn_pairs(model) if found is None else found
    _check_model(model)
    if not any(is_norm(module) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has no BatchNorm, so there is nothing to put in {mode!r} mode")
    pairs = _chosen(model, pairs)
    _convert(model, mode, pairs, recompute)
    return pairs


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


def get_mode(model: nn.Module) -> Mode:
    """Return the mode that `set_mode` has put a model in; ``"train"`` for a model that it has not touched.

    Parts that were never converted don't count, so a model whose backbone alone is in Tune mode is in Tune mode.

    Raises:
        ValueError: If parts of the model are in different modes.

    Example:
        >>> from torch import nn
        >>> get_mode(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        'train'
    """
    modes = {swap.mode: name for name, module in model.named_modules() if (swap := swap_of(module)) is not None}
    if len(modes) > 1:
        parts = ", ".join(f"`{name}` is in {mode!r}" for mode, name in sorted(modes.items()))
        raise ValueError(f"model: {type(model).__name__} is in no single mode ({parts}); ask for its parts")
    return next(iter(modes), "train")


@contextmanager
def conv_bn_mode(
    model: nn.Module, mode: Mode, *, pairs: ConvBNPairs | None = None, recompute: Recompute = "none"
) -> Iterator[ConvBNPairs]:
    """Switch a model to a mode for a ``with`` block; the previous mode comes back, also after an exception.

    The arguments, and what ``as`` receives, are `set_mode`'s.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> with conv_bn_mode(model, "deploy"):
        ...     get_mode(model)
        'deploy'
        >>> get_mode(model)
        'train'
    """
    before = _state(model)
    chosen = set_mode(model, mode, pairs=pairs, recompute=recompute)
    try:
        yield chosen
    finally:
        if _state(model) != before:
            mode, pairs, recompute = before
            pairs = None if pairs is None else _fitting(model, pairs)
            set_mode(model, mode, pairs=pairs, recompute=recompute)


def check_choice(argument: str, value: object, allowed: tuple[str, ...], why_not: str = "") -> None:
    """Raise a ValueError that names the argument, its value and the values it may take."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{argument} must be one of {choices}; got {value!r}.{why_not and ' ' + why_not}")


def check_recompute(mode: Mode, recompute: Recompute) -> None:
    """Raise a ValueError if there is no such choice, or if a mode that recomputes nothing is to recompute."""
    check_choice("recompute", recompute, RECOMPUTE)
    if recompute != "none" and mode not in RECOMPUTING_MODES:
        raise ValueError(
            f"recompute={recompute!r} needs the mode to be 'eval' or 'tune'; got {mode!r}, which recomputes nothing"
        )


def _state(model: nn.Module) -> tuple[Mode, ConvBNPairs | None, Recompute]:
    """All that `set_mode` must be told to bring a model back to where it is."""
    chosen: set[Recompute] = {vars(module).get("_recompute", "none") for module in model.modules()}
    return get_mode(model), pairs_in_force(model), max(chosen - {"none"}, default="none")


def _chosen(model: nn.Module, pairs: ConvBNPairs | None) -> ConvBNPairs:
    """What was asked for, else what is in force and fits still, else what can be found."""
    if pairs is not None:
        return pairs
    pairs = pairs_in_force(model)
    return find_conv_bn_pairs(model) if pairs is None else _fitting(model, pairs)


def _fitting(model: nn.Module, pairs: ConvBNPairs) -> ConvBNPairs:
    """Return pairs that were in force, without those whose modules were replaced, removed or parametrized since."""
    names = {name for name, _ in model.named_modules()}
    reason_of = {bn: _unfit(model, conv, bn) if {conv, bn} <= names else reasons.TORN for conv, bn in pairs}
    return pairs.unfold({bn: reason for bn, reason in reason_of.items() if reason is not None})


def _unfit(model: nn.Module, conv_name: str, bn_name: str) -> str | None:
    """Return the reason why two modules of a model can't be folded; None if they can."""
    bn = model.get_submodule(bn_name)
    reason = f"`{bn_name}` is no BatchNorm" if not is_norm(bn) else statistics_missing(bn)
    return reason or mismatch(model, conv_name, bn_name)


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"model: `{name or type(module).__name__}`"
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"{where} is wrapped in DataParallel, whose replicas would keep using the BatchNorms of the original; "
                "use DistributedDataParallel"
            )
        if is_scripted_norm(module):
            raise ValueError(
                f"{where} is a BatchNorm in TorchScript, whose code can't be changed; convert the model before "
                "scripting"
            )


def _convert(model: nn.Module, mode: Mode, pairs: ConvBNPairs, recompute: Recompute) -> None:
    """Check everything first, then swap: bad input never leaves a model half converted."""
    conv_of = _checked_partners(model, pairs)
    _part_from_others(set(model.modules()))
    folded_convs = set() if mode == "eval" else set(conv_of.values())
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_norm(module):
            _convert_norm(name, module, mode, pairs, conv_of.get(module), recompute)
        elif module not in folded_convs:
            restore_class(module)
    for conv_name, bn_name in pairs if mode != "eval" else ():
        row = conv_layer(modules[conv_name])
        assert row is not None
        cls = row.tune if mode == "tune" else row.deploy
        reshaped = pairs.reshaped.get(bn_name, 0)
        swap_class(modules[conv_name], cls, mode, bn=modules[bn_name], reshaped=reshaped)


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
        reason = _unfit(model, conv_name, bn_name)
        if reason is not None:
            raise ValueError(f"pairs: `{conv_name}` and `{bn_name}` can't be folded: {reason}")
        conv_of[modules[bn_name]] = modules[conv_name]
    if len(set(conv_of.values())) < len(pairs):
        raise ValueError("pairs: a convolution or a BatchNorm is in more than one pair")
    return conv_of
