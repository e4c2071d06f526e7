"""What the callback logs to every logger, as ``convbn/...``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_convbn.memory.use import MIB
from lightning_convbn.trainer.lightning_api import Trainer
from lightning_convbn.trainer.report import Findings


def log_kept_bytes(trainer: Trainer, parts: Sequence[Findings]) -> None:
    """Log what Eval and Tune mode keep for the backward pass, summed over the parts that were counted.

    If there is one part, its peaks are logged, too. The peaks of several parts are not those of their step.
    """
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
    if len(parts) == 1 and parts[0].peak_bytes is not None:
        metrics |= {f"predicted_peak_{mode}_mib": peak / MIB for mode, peak in parts[0].peak_bytes.items()}
    log(trainer, metrics)


def log_peaks(trainer: Trainer, device: torch.device) -> None:
    """Log the most CUDA memory that was in use since the peaks were last reset."""
    metrics = {
        "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
    }
    log(trainer, metrics)


def log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log metrics.

    ``LightningModule.log`` does not work in all hooks, and it does not use each logger's own separator.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for logger in trainer.loggers:
        named = {f"convbn{logger.group_separator}{name}": value for name, value in metrics.items()}
        logger.log_metrics(named, step=trainer.global_step)
