"""Checks the arguments of the callback that can be checked before a Trainer runs."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from lightning_convbn.exporting.argument_checks import check_suffix
from lightning_convbn.layers.state import Mode, Recompute
from lightning_convbn.memory.budget import checked_budget
from lightning_convbn.modes import RECOMPUTE, check_choice, check_recompute


def check_modes(mode: Mode, eval_mode: Mode, start_epoch: int) -> None:
    """Raise a ValueError if there is no such mode, or if the epoch is none."""
    why_not = {"deploy": "Training folded weights is unstable (arXiv 2305.11624): use 'tune'"}
    check_choice("mode", mode, ("train", "eval", "tune"), why_not.get(str(mode), ""))
    check_choice("eval_mode", eval_mode, ("eval", "tune", "deploy"))
    if isinstance(start_epoch, bool) or not isinstance(start_epoch, int) or start_epoch < 0:
        raise ValueError(f"start_epoch must be an epoch, 0 or later; got {start_epoch!r}")


def check_recomputation(mode: Mode, recompute: Recompute, memory_budget: int | str | None) -> None:
    """Raise a ValueError if there is no such choice, or if the budget is no amount or comes with ``recompute``."""
    check_choice("recompute", recompute, RECOMPUTE)
    check_recompute(mode, recompute)
    if memory_budget is None:
        return
    checked_budget(memory_budget)
    if recompute != "none":
        raise ValueError(
            f"memory_budget={memory_budget!r} chooses what to recompute, and so does recompute={recompute!r}; give one "
            "of the two"
        )


def check_export_path(export_path: str | PathLike[str] | None) -> None:
    """Raise a ValueError if there is no format for the suffix of the path."""
    if export_path is not None:
        check_suffix("export_path", Path(export_path))
