"""What the callback says: it prints a table, warns, and logs metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_convbn.layers.swap import Mode
from lightning_convbn.memory import MIB
from lightning_convbn.pairs.reasons import UNTRAINED
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.lightning_api import Trainer, rank_zero_info, rank_zero_warn


def print_table(trainer: Trainer, parts: Sequence[ConvertedPart], mode: Mode, eval_mode: Mode) -> None:
    """Print what was folded, what was not, and what the first batch has shown; above the progress bar if there is one.

    Args:
        trainer: The Trainer. Only its first process prints.
        parts: The converted parts.
        mode: The mode that training runs in.
        eval_mode: The mode that evaluation runs in.
    """
    if trainer.is_global_zero:
        lines = [line for part in parts for line in part.describe(mode, eval_mode)]
        bar = trainer.progress_bar_callback
        (bar.print if bar is not None else rank_zero_info)("\n".join(lines))


def warn_about(part: ConvertedPart) -> None:
    """Warn of pairs that are folded no more, and of BatchNorms in Train mode.

    Args:
        part: A converted part.
    """
    for name, reason in part.wrong.items():
        rank_zero_warn(f"ConvBN: `{part.full_name(name)}` goes back to Eval mode: {reason}")
    if part.untrained:
        rank_zero_warn(
            f"ConvBN: {len(part.untrained)} BatchNorm(s) of `{part.path or 'the module'}` stay in Train mode: "
            f"`{part.untrained[0]}` {UNTRAINED}. Load pretrained weights, or set freeze_untrained=True"
        )


def log_kept_bytes(trainer: Trainer, parts: Sequence[ConvertedPart]) -> None:
    """Log what Eval and Tune mode keep for the backward pass, summed over the parts that were counted."""
    counted = [part.kept_bytes for part in parts if part.kept_bytes is not None]
    if not counted:
        return
    before, after = (sum(kept_bytes[mode] for kept_bytes in counted) / MIB for mode in ("eval", "tune"))
    metrics = {
        "activations_eval_mib": before,
        "activations_tune_mib": after,
        "activations_saved_mib": before - after,
        "activations_saved_percent": 100 * (before - after) / before if before else 0.0,
    }
    _log(trainer, metrics)


def log_peaks(trainer: Trainer, device: torch.device) -> None:
    """Log the most CUDA memory that was in use since the peaks were last reset."""
    metrics = {
        "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
    }
    _log(trainer, metrics)


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log to every logger, as ``convbn/...``.

    ``LightningModule.log`` does not work in all hooks, and it does not use each logger's own separator.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for logger in trainer.loggers:
        named = {f"convbn{logger.group_separator}{name}": value for name, value in metrics.items()}
        logger.log_metrics(named, step=trainer.global_step)
