"""The callbacks of a Trainer: our place in the list, and callbacks that we can't work with."""

from __future__ import annotations

from lightning_convbn.trainer.lightning_api import Callback, Trainer


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


def put_first(trainer: Trainer, callback: Callback) -> None:
    """Move a callback to the front of the Trainer's list."""
    set_callbacks(trainer, [callback, *(other for other in callbacks_of(trainer) if other is not callback)])


def check_no_weight_averaging(trainer: Trainer) -> None:
    """Raise a ValueError if a Trainer has Lightning's StochasticWeightAveraging, or a callback derived from it."""
    for callback in callbacks_of(trainer):
        if any(cls.__name__ == "StochasticWeightAveraging" for cls in type(callback).__mro__):
            raise ValueError(
                "callbacks: StochasticWeightAveraging resets the BatchNorm statistics that ConvBNModeCallback freezes; "
                "use WeightAveraging, or leave one of the two out"
            )
