"""The callbacks of a Trainer: our place in the list, and callbacks that we can't work with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_convbn.trainer.lightning_api import Callback, LightningModule, Trainer

FINDERS = ("BatchSizeFinder", "LearningRateFinder")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Give a Trainer a list of callbacks. A list that Lightning is going through at this moment stays as it is."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def steps_aside(trainer: Trainer, callback: Callback, kind: Any) -> bool:
    """Whether a callback gives way to another one of its kind. A Trainer may have only one that does not.

    Raises:
        ValueError: If it has more.
    """
    given = [other for other in callbacks_of(trainer) if isinstance(other, kind) and not other.gives_way]
    if len(given) > 1:
        raise ValueError(
            f"callbacks: {kind.__name__} is given {len(given)} times; give one, with target=[...] for several parts"
        )
    return bool(given) and callback not in given


def put_behind_others(trainer: Trainer, callback: Callback) -> Callable[[], None]:
    """Move a callback behind those that may change the model, and the finders behind it.

    So a finder, which runs in ``on_fit_start``, tries a model that is changed and converted. Lightning's checkpoint
    callbacks stay last. All others keep the order that the user gave them.

    Returns:
        What gives the Trainer its own list back. Callbacks that were added or removed since stay so.
    """
    found = callbacks_of(trainer)
    others = [other for other in found if other is not callback]
    finders = [other for other in others if _is_a(other, *FINDERS)]
    checkpoints = [other for other in others if _is_a(other, "Checkpoint")]
    rest = [other for other in others if other not in (*finders, *checkpoints)]
    set_callbacks(trainer, [*rest, callback, *finders, *checkpoints])
    return partial(_put_back, trainer, found)


def _put_back(trainer: Trainer, found: list[Callback]) -> None:
    now = [other.finder if isinstance(other, _Trial) else other for other in callbacks_of(trainer)]
    found[:] = [*(other for other in found if other in now), *(other for other in now if other not in found)]
    set_callbacks(trainer, found)


def convert_for_trials(trainer: Trainer, hook: str, convert: Callable[[], None], restore: Callable[[], None]) -> None:
    """Convert modules while a finder of batch size or learning rate tries them in a hook, and not a moment longer.

    Other hooks of this name come afterwards: the LightningModule's own. They find plain modules.

    Args:
        trainer: The Trainer. It is going through its list of callbacks, and we come before the finders.
        hook: The name of the hook that it calls.
        convert: Called before the finder's hook.
        restore: Called after it, also if it raises: the finder has taken the callbacks away, so none hears of that.
    """
    callbacks = callbacks_of(trainer)
    for index, finder in enumerate(callbacks):
        if _is_a(finder, *FINDERS) and any(
            hook in vars(cls) for cls in type(finder).__mro__ if cls.__name__ != "Callback"
        ):
            callbacks[index] = _Trial(finder, hook, callbacks, convert, restore)


class _Trial(Callback):
    """Has the place of a finder in the list of callbacks until Lightning calls one hook. Then the finder is back."""

    def __init__(
        self,
        finder: Callback,
        hook: str,
        callbacks: list[Callback],
        convert: Callable[[], None],
        restore: Callable[[], None],
    ) -> None:
        self.finder = finder

        def try_finder(trainer: Trainer, pl_module: LightningModule) -> None:
            callbacks[callbacks.index(self)] = finder
            convert()
            try:
                getattr(finder, hook)(trainer, pl_module)
            finally:
                restore()

        setattr(self, hook, try_finder)


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
