"""The callbacks of a Trainer: our place in the list, and callbacks that we can't work with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_convbn.trainer.lightning_api import Callback, Trainer

FINDERS = ("BatchSizeFinder", "LearningRateFinder")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Give a Trainer a new list of callbacks. A list that Lightning is going through at this moment stays as it is."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def check_only_one(trainer: Trainer, kind: type[Callback]) -> None:
    """Raise a ValueError if a Trainer has more than one callback of a kind."""
    count = sum(isinstance(callback, kind) for callback in callbacks_of(trainer))
    if count > 1:
        raise ValueError(
            f"callbacks: {kind.__name__} is given {count} times; give one, with target=[...] for several parts"
        )


def put_behind_others(trainer: Trainer, callback: Callback) -> None:
    """Move a callback behind those that may change the model, and the finders behind it.

    So a finder, which runs in ``on_fit_start``, tries a model that is changed and converted. Lightning's checkpoint
    callbacks stay last. All others keep the order that the user gave them.
    """
    others = [other for other in callbacks_of(trainer) if other is not callback]
    finders = [other for other in others if _is_a(other, *FINDERS)]
    checkpoints = [other for other in others if _is_a(other, "Checkpoint")]
    rest = [other for other in others if other not in (*finders, *checkpoints)]
    set_callbacks(trainer, [*rest, callback, *finders, *checkpoints])


def convert_for_trials(trainer: Trainer, hook: str, convert: Callable[[], None], give_back: Callable[[], None]) -> None:
    """Convert modules while a finder of batch size or learning rate tries them in a hook, and not a moment longer.

    Other hooks of this name come afterwards: the LightningModule's own. They find plain modules.

    Args:
        trainer: The Trainer.
        hook: The name of the hook, which Lightning calls next.
        convert: Called before the finder's hook.
        give_back: Called after it, also if it raises: the finder has taken the callbacks away, so none hears of that.
    """
    for finder in callbacks_of(trainer):
        if _is_a(finder, *FINDERS) and any(
            hook in vars(cls) for cls in type(finder).__mro__ if cls.__name__ != "Callback"
        ):
            setattr(finder, hook, partial(_try, finder, hook, convert, give_back))


def _try(
    finder: Callback, hook: str, convert: Callable[[], None], give_back: Callable[[], None], *args: Any, **kwargs: Any
) -> None:
    delattr(finder, hook)  # its own method comes to light
    convert()
    try:
        getattr(finder, hook)(*args, **kwargs)
    finally:
        give_back()


def check_no_weight_averaging(trainer: Trainer) -> None:
    """Raise a ValueError if a Trainer has Lightning's StochasticWeightAveraging, or a callback derived from it."""
    for callback in callbacks_of(trainer):
        if _is_a(callback, "StochasticWeightAveraging"):
            raise ValueError(
                "callbacks: StochasticWeightAveraging resets the BatchNorm statistics that ConvBNModeCallback freezes; "
                "use WeightAveraging, or leave one of the two out"
            )


def _is_a(callback: Callback, *names: str) -> bool:
    """Whether a callback is of a class of one of these names, or derived from it, in either package of Lightning."""
    return any(cls.__name__ in names for cls in type(callback).__mro__)
