"""No line at all: the callback that a Trainer gets because the environment variable LIGHTNING_CONVBN names a mode.

Lightning asks `entry_point.py` for it, which imports this module only if the variable is set.
"""

from __future__ import annotations

from types import new_class
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_convbn.callback import ConvBNModeCallback

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:  # what makes ConvBNModeCallback a callback for the installed packages makes this one, too
    Callback = new_class("Callback", ConvBNModeCallback.__bases__)

VARIABLE = "LIGHTNING_CONVBN"
MODES = ("tune", "eval", "train")


class ConvBNFromEnvironment(Callback):
    """Stands in for the callback until it is known which callbacks the Trainer has.

    That is when a run begins: the LightningModule's ``configure_callbacks`` may bring some, too. ConvBNModeCallback
    refuses to run beside a second one of its kind, so this is none.

    Args:
        mode: The value of the variable.

    Raises:
        ValueError: If that is not a mode.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(
                f"{VARIABLE}={mode!r}: there is no such mode; set the environment variable to one of "
                f"{', '.join(map(repr, MODES))}, or to 'off' to leave ConvBNModeCallback out"
            )
        self.callback = _YieldingCallback(mode)  # type: ignore[arg-type]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the callback in."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self.callback if other is self else other for other in callbacks]  # type: ignore[attr-defined]
        self.callback.setup(trainer, pl_module, stage)


class _YieldingCallback(ConvBNModeCallback):
    """A ConvBNModeCallback that leaves the Trainer where it is not needed, or of no use, instead of failing."""

    @property
    def _origin(self) -> str:
        return f"{VARIABLE}={self.mode}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Yield to a callback that the user gave."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, ConvBNModeCallback) and other is not self for other in callbacks):
            rank_zero_info(f"ConvBN: {self._origin} is not used, this Trainer has a ConvBNModeCallback already")
            self._leave(trainer)
        else:
            super().setup(trainer, pl_module, stage)

    def _find_targets(self, pl_module: LightningModule) -> None:
        """Warn where there is no BatchNorm: the user has set the variable for a script, not for this model."""
        try:
            super()._find_targets(pl_module)
        except ValueError as error:
            rank_zero_warn(f"ConvBN: {self._origin} has no effect: {error}")
            self._leave(pl_module.trainer)

    def _leave(self, trainer: Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [other for other in callbacks if other is not self]  # type: ignore[attr-defined]
