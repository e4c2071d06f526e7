"""The callback without a change in the code: the variable ``LIGHTNING_CONVBN`` names its mode, and what it recomputes.

Lightning calls `entry_point.py` whenever a Trainer is made. Only if the variable is set is this module imported.
"""

from __future__ import annotations

from typing_extensions import override

from lightning_convbn.callback import ConvBNModeCallback
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.lightning_api import LightningModule, Trainer, rank_zero_info, rank_zero_warn

VARIABLE = "LIGHTNING_CONVBN"
MODES = ("tune", "eval", "train")
OPTIONS = ("recompute", "memory_budget")


class ConvBNFromEnvironment(ConvBNModeCallback):
    """A ConvBNModeCallback that does nothing if the user gave one, or if the model has no BatchNorm.

    That is only known when a run begins: the LightningModule's ``configure_callbacks`` may bring callbacks, too.

    Args:
        value: The value of the variable: a mode, and what else is to be said, as ``train,recompute=elementwise``.

    Raises:
        ValueError: If that can't be used.
    """

    gives_way = True

    def __init__(self, value: str) -> None:
        mode, *rest = (word.strip() for word in value.lower().split(","))
        options = {name.strip(): text.strip() for name, _, text in (word.partition("=") for word in rest)}
        if mode not in MODES:
            raise ValueError(
                f"{VARIABLE}={value!r}: there is no such mode; set the environment variable to one of "
                f"{', '.join(map(repr, MODES))}, or to 'off' to leave ConvBNModeCallback out"
            )
        if not options.keys() <= {*OPTIONS} or len(options) < len(rest):
            raise ValueError(
                f"{VARIABLE}={value!r}: a mode may be followed by recompute=... or memory_budget=..., as "
                f"'{mode},recompute=elementwise'"
            )
        try:
            super().__init__(mode, **options)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{VARIABLE}={value!r}: {error}") from None
        self._value = value

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the start of a stage: say if there is another."""
        super().setup(trainer, pl_module, stage)
        if self.steps_aside:
            rank_zero_info(
                f"ConvBN: {VARIABLE}={self._value} is not used, this Trainer has a ConvBNModeCallback already"
            )

    @override
    def find_parts(self, pl_module: LightningModule) -> list[ConvertedPart]:
        """Warn if there is no BatchNorm, instead of an error: the variable was set for a script, not for this model."""
        try:
            return super().find_parts(pl_module)
        except ValueError as error:
            rank_zero_warn(f"ConvBN: {VARIABLE}={self._value} has no effect: {error}")
            return []
