"""What the callback says: it prints a table, warns, and logs metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from lightning_convbn.layers.swap import Mode
from lightning_convbn.memory.use import MIB
from lightning_convbn.pairs.reasons import UNTRAINED
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.lightning_api import Trainer, rank_zero_info, rank_zero_warn

_NUMBER_OR_NAME = re.compile(r"`[^`]+`|\d[\d.e+-]*")


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


def warn_about(part: ConvertedPart, *, verify: bool) -> None:
    """Warn of pairs that are folded no more or not verified, and of BatchNorms in Train mode.

    There is one warning for one cause, however many pairs it concerns.

    Args:
        part: A converted part.
        verify: Whether the pairs were to be verified.
    """
    for names, reason in _causes(part.wrong):
        others = f" and {len(names) - 1} more BatchNorms go" if len(names) > 1 else " goes"
        rank_zero_warn(f"ConvBN: `{part.full_name(names[0])}`{others} back to Eval mode: {reason}")
    if verify and part.unverified:
        rank_zero_warn(
            f"ConvBN: the folded pairs of `{part.path or 'the module'}` are not verified: none of them ran in the "
            "first batch. Set target=... to the modules that training_step calls, or verify=False"
        )
    if part.untrained:
        rank_zero_warn(
            f"ConvBN: {len(part.untrained)} BatchNorm(s) of `{part.path or 'the module'}` stay in Train mode: "
            f"`{part.untrained[0]}` {UNTRAINED}. Load pretrained weights, or set freeze_untrained=True"
        )


def _causes(wrong: Mapping[str, str]) -> list[tuple[list[str], str]]:
    """Group names by reason: the names, and the first one's reason. Reasons that differ in a number are one cause."""
    causes: dict[str, tuple[list[str], str]] = {}
    for name, reason in wrong.items():
        causes.setdefault(_NUMBER_OR_NAME.sub("", reason), ([], reason))[0].append(name)
    return list(causes.values())


def log_kept_bytes(trainer: Trainer, parts: Sequence[ConvertedPart]) -> None:
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
