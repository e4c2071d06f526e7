"""What the callback logs to every logger, as ``convbn/...``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_convbn.memory.use import MIB
from lightning_convbn.trainer.lightning_api import Trainer
from lightning_convbn.trainer.report import Findings


def log_kept_bytes(trainer: Trainer, parts: Sequence[Findings]) -> None:
    """Log what a step keeps for the backward pass without this package and with it, summed over what was counted.

    If there is one part, its peaks are logged, too. The peaks of several parts are not those of their step.
    """
    counted = [(part.sides, part.kept_bytes) for part in parts if part.sides is not None and part.kept_bytes]
    if not counted:
        return
    names = [side.metric for side in counted[0][0]]
    before, after = (sum(kept_bytes[side] for _, kept_bytes in counted) / MIB for side in range(2))
    metrics = {
        f"activations_{names[0]}_mib": before,
        f"activations_{names[1]}_mib": after,
        "activations_saved_mib": before - after,
        "activations_saved_percent": 100 * (before - after) / before if before else 0.0,
    }
    if len(parts) == 1 and parts[0].peak_bytes is not None:
        peaks = zip(names, parts[0].peak_bytes, strict=True)
        metrics |= {f"predicted_peak_{name}_mib": peak / MIB for name, peak in peaks}
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
