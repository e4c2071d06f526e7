"""The callback without a change in the code: the environment variable ``LIGHTNING_CONVBN`` names its mode.

Lightning calls `entry_point.py` whenever a Trainer is made. Only if the variable is set is this module imported.
"""

from __future__ import annotations

from typing_extensions import override

from lightning_convbn.callback import ConvBNModeCallback
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.lightning_api import Callback, LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_convbn.trainer.other_callbacks import callbacks_of, set_callbacks

VARIABLE = "LIGHTNING_CONVBN"
MODES = ("tune", "eval", "train")


class ConvBNFromEnvironment(Callback):
    """Holds the place of the callback until a run begins.

    Only then it is known which callbacks the Trainer has: the LightningModule's ``configure_callbacks`` may bring some,
    too. This class is not derived from ConvBNModeCallback, because a Trainer may have only one of those.

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
        self.callback = _OptionalCallback(mode)  # type: ignore[arg-type]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the start of a stage: give this place to the callback."""
        set_callbacks(trainer, [self.callback if other is self else other for other in callbacks_of(trainer)])
        self.callback.setup(trainer, pl_module, stage)


class _OptionalCallback(ConvBNModeCallback):
    """A ConvBNModeCallback that leaves the Trainer if the user gave one, or if the model has no BatchNorm."""

    @property
    def _origin(self) -> str:
        return f"{VARIABLE}={self.mode}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the start of a stage: begin a new run, unless the user gave a ConvBNModeCallback."""
        if any(isinstance(other, ConvBNModeCallback) and other is not self for other in callbacks_of(trainer)):
            rank_zero_info(f"ConvBN: {self._origin} is not used, this Trainer has a ConvBNModeCallback already")
            self._leave(trainer)
        else:
            super().setup(trainer, pl_module, stage)

    @override
    def _find_parts(self, pl_module: LightningModule) -> list[ConvertedPart]:
        """Warn if there is no BatchNorm, instead of an error: the variable was set for a script, not for this model."""
        try:
            return super()._find_parts(pl_module)
        except ValueError as error:
            rank_zero_warn(f"ConvBN: {self._origin} has no effect: {error}")
            self._leave(pl_module.trainer)
            return []

    def _leave(self, trainer: Trainer) -> None:
        set_callbacks(trainer, [other for other in callbacks_of(trainer) if other is not self])
