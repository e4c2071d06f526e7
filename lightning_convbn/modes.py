"""Switching a model between Train, Eval, Tune and Deploy mode, in place and exactly reversible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

from torch import nn

from lightning_convbn.blocks.find import recompute_of, why_not
from lightning_convbn.blocks.recomputed import Block
from lightning_convbn.conversion import convert, restore_modules, unfit
from lightning_convbn.layers.state import Mode, Recompute, state_of
from lightning_convbn.layers.supported_layers import is_norm, is_scripted_norm
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.find import find_conv_bn_pairs, pairs_in_force
from lightning_convbn.pairs.pair import ConvBNPairs

MODES: tuple[Mode, ...] = get_args(Mode)
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
RECOMPUTING_MODES: tuple[Mode, ...] = ("train", "eval", "tune")


def set_mode(
    model: nn.Module,
    mode: Mode,
    *,
    pairs: ConvBNPairs | None = None,
    recompute: Recompute | Sequence[str] = "none",
) -> ConvBNPairs:
    """Switch a model to a mode, in place, from whatever mode it is in.

    - ``"train"``: the modules exactly as they were found, if nothing is recomputed. This always succeeds, also for a
      part of a converted model, and after modules were replaced. A BatchNorm outside of the part is no longer folded if
      its convolution is plain.
    - ``"eval"``: every BatchNorm with running statistics is frozen at them, whoever calls ``.train()``.
    - ``"tune"``: as Eval, but paired BatchNorms are folded into their convolution at every forward. Gradients reach
      every parameter and equal Eval's. The convolution's own output is not kept for the backward pass. Nothing is
      cached from one forward to the next.
    - ``"deploy"``: as Tune, but folded once, at the first forward after the switch, for passes that need no gradient of
      a parameter. Where one is needed it runs as Tune does. The fold is made again after a write that PyTorch counts;
      a write through ``.data`` is noticed at the next switch.

    Classes, parameters, buffers, ``state_dict`` keys, hooks and optimizers are not touched. A frozen BatchNorm has
    ``training=False``; when it is restored, it gets the flag that was asked for last. A BatchNorm without running
    statistics stays unfrozen: it keeps running as it was found. A copy or a pickle of a converted model is plain. Its
    frozen BatchNorms have ``training=False``, until you call ``.train()`` on the copy.

    Args:
        model: Any module. Wrappers such as DDP are fine; ``DataParallel`` and a BatchNorm in TorchScript are not.
        mode: ``"train"``, ``"eval"``, ``"tune"`` or ``"deploy"``.
        pairs: What to fold; None for the pairs in force, or, in a plain model, for what `find_conv_bn_pairs` finds.
        recompute: ``"none"``, or, in Train, Eval or Tune mode, ``"elementwise"``: what can be computed again,
            elementwise, from what is kept anyway is not kept for the backward pass. This goes for outputs of
            BatchNorms, activations, products and concatenations, among others (`ops/elementwise.py`). With
            ``"blocks"``, repeated blocks also run their forward again in the backward pass, and keep only what is given
            to them; `recomputed_blocks` names them, and a list of names takes others in their place. The results are
            the same to the bit, and running statistics are written once. Between the layers tensors are of a subclass
            of Tensor. Each call of `set_mode` decides anew.

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
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), convbn='tune')
          (1): BatchNorm2d(8, eps=1e-05, momentum=0.1, ..., convbn='tune')
        )
    """
    check_choice("mode", mode, MODES)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_recompute(mode, recompute)
    if mode == "train" and recompute == "none":
        found = pairs_in_force(model) if pairs is None else pairs
        restore_modules(model.modules())
        return find_conv_bn_pairs(model) if found is None else found
    _check_model(model)
    if not any(is_norm(module) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has no BatchNorm, so there is nothing to put in {mode!r} mode")
    pairs = _chosen(model, pairs)
    convert(model, mode, pairs, recompute)
    return pairs


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
    modes = {state.mode: name for name, module in model.named_modules() if (state := state_of(module)) is not None}
    if len(modes) > 1:
        parts = ", ".join(f"`{name}` is in {mode!r}" for mode, name in sorted(modes.items()))
        raise ValueError(f"model: {type(model).__name__} is in no single mode ({parts}); ask for its parts")
    return next(iter(modes), "train")


@contextmanager
def conv_bn_mode(
    model: nn.Module,
    mode: Mode,
    *,
    pairs: ConvBNPairs | None = None,
    recompute: Recompute | Sequence[str] = "none",
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
            if not isinstance(recompute, str):
                there = {name for name, _ in model.named_modules()}
                recompute = [name for name in recompute if name in there and why_not(model, name, pairs or ()) is None]
            set_mode(model, mode, pairs=pairs, recompute=recompute)


def check_choice(argument: str, value: object, allowed: tuple[str, ...], why_not: str = "") -> None:
    """Raise a ValueError that names the argument, its value and the values it may take."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{argument} must be one of {choices}; got {value!r}.{why_not and ' ' + why_not}")


def check_recompute(mode: Mode, recompute: Recompute | Sequence[str]) -> None:
    """Raise a ValueError if there is no such choice, or if a mode that recomputes nothing is to recompute."""
    if not _are_names(recompute):
        check_choice("recompute", recompute, RECOMPUTE)
    if recompute != "none" and mode not in RECOMPUTING_MODES:
        raise ValueError(
            f"recompute={recompute!r} needs the mode to be 'train', 'eval' or 'tune'; got {mode!r}, which recomputes "
            "nothing"
        )


def _are_names(recompute: object) -> bool:
    """Whether an argument is a list or a tuple of texts."""
    return isinstance(recompute, (list, tuple)) and all(isinstance(name, str) for name in recompute)


def _state(model: nn.Module) -> tuple[Mode, ConvBNPairs | None, Recompute | list[str]]:
    """All that `set_mode` must be told to bring a model back to where it is."""
    recompute: Recompute | list[str] = recompute_of(model)
    if recompute == "blocks":
        recompute = [name for name, module in model.named_modules() if isinstance(state_of(module), Block)]
    return get_mode(model), pairs_in_force(model), recompute


def _chosen(model: nn.Module, pairs: ConvBNPairs | None) -> ConvBNPairs:
    """What was asked for, else what is in force and fits still, else what can be found."""
    if pairs is not None:
        return pairs
    pairs = pairs_in_force(model)
    return find_conv_bn_pairs(model) if pairs is None else _fitting(model, pairs)


def _fitting(model: nn.Module, pairs: ConvBNPairs) -> ConvBNPairs:
    """Return pairs that were in force, without those whose modules were replaced, removed or parametrized since."""
    names = {name for name, _ in model.named_modules()}
    reason_of = {bn: unfit(model, conv, bn) if {conv, bn} <= names else reasons.TORN for conv, bn in pairs}
    return pairs.unfold({bn: reason for bn, reason in reason_of.items() if reason is not None})


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
