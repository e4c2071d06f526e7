"""What the callback says: it prints a table, and warns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lightning_convbn.layers.state import Mode
from lightning_convbn.memory.use import as_mib
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
    print_lines(trainer, [line for part in parts for line in describe(part, mode, eval_mode)])


def print_lines(trainer: Trainer, lines: Sequence[str]) -> None:
    """Print lines in the first process, above the progress bar if there is one."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        (bar.print if bar is not None else rank_zero_info)("\n".join(lines))


def describe(part: ConvertedPart, mode: Mode, eval_mode: Mode) -> list[str]:
    """Return the lines of the table about one part.

    Args:
        part: A converted part.
        mode: The mode that training runs in.
        eval_mode: The mode that evaluation runs in.
    """
    name = f"`{part.path}`" if part.path else "the whole module"
    heading = f"ConvBN: {name} trains in {mode.title()} mode and is evaluated in {eval_mode.title()} mode"
    blocks = () if part.recompute in ("none", "elementwise") else part.blocks.summary()
    body = [*_folding_lines(part, mode, eval_mode), *blocks, *_memory_lines(part, mode)]
    verified = part.verification
    if verified is not None and verified.deviation is not None:
        word = "differs from" if verified.wrong else "equals"
        body.append(f"verified: Tune {word} Eval, relative deviation {verified.deviation:.1e}")
    if not part.checked:
        also = "" if verified is not None and verified.compared else "neither verified nor "
        body.append(f"{also or 'not '}counted: the first batch did not pass through its forward")
    return [heading, *(f"  {line}" for line in (*body, *part.notes))]


def _folding_lines(part: ConvertedPart, mode: Mode, eval_mode: Mode) -> list[str]:
    """Say what is folded: in training, in evaluation alone, or in neither."""
    if mode == "tune" or not part.pairs:
        return part.pairs.summary()
    in_evaluation = eval_mode in ("tune", "deploy")
    first, *others = part.pairs.summary("folded" if in_evaluation else "foldable")
    return [first + (", in evaluation alone" if in_evaluation else "; Tune mode would fold them"), *others]


def _memory_lines(part: ConvertedPart, mode: Mode) -> list[str]:
    if part.kept_bytes is None:
        return []
    before, after = part.kept_bytes["eval"], part.kept_bytes["tune"]
    saved = f"{100 * (before - after) / before:.1f} % saved" if before else "no parameter wants a gradient"
    keeps, takes = ("Tune", "Tune") if mode == "tune" else ("Tune would keep", "Tune would take")
    chosen = part.recompute if isinstance(part.recompute, str) else f"{len(part.recompute)} blocks"
    recomputing = f" (recompute={chosen})" if chosen != "none" else ""
    lines = [f"kept for backward: Eval {as_mib(before)}, {keeps} {as_mib(after)}{recomputing}, {saved}"]
    if part.peak_bytes is not None:
        before, after = part.peak_bytes["eval"], part.peak_bytes["tune"]
        change = f"{100 * abs(after - before) / before:.1f} % {'more' if after > before else 'less'}"
        lines.append(f"peak of a step: Eval {as_mib(before)}, {takes} {as_mib(after)}{recomputing}, {change}")
    return lines


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
