"""What the callback says about the first batch: it prints a table, and warns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_convbn.blocks.find import Blocks
from lightning_convbn.layers.state import Mode
from lightning_convbn.memory.plan import Choice
from lightning_convbn.memory.use import as_mib
from lightning_convbn.pairs.reasons import UNTRAINED
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.lightning_api import Trainer, rank_zero_info, rank_zero_warn
from lightning_convbn.trainer.verification import Verification

_NUMBER_OR_NAME = re.compile(r"`[^`]+`|\d[\d.e+-]*")


class Side(NamedTuple):
    """One side of a comparison of memory.

    Attributes:
        name: Its name in the table.
        metric: Its name in a logged metric.
        mode: Its mode.
        recompute: What it recomputes.
    """

    name: str
    metric: str
    mode: Mode
    recompute: Choice


def sides_of(part: ConvertedPart) -> tuple[Side, Side]:
    """Return what is compared: a step without this package, and one with it as asked for, or as it could be."""
    if part.mode != "train":
        before = Side("Eval", "eval", "eval", part.recompute if part.mode == "eval" else "none")
        return before, Side("Tune", "tune", "tune", part.recompute)
    after = "elementwise" if part.recompute == "none" else part.recompute
    return Side("Train", "train", "train", "none"), Side(_asked(after), "train_recomputed", "train", after)


@dataclass
class Findings:
    """What the first batch shows about one part.

    Attributes:
        asked: What was to be done: ``"verified"``, ``"counted"``, both or neither.
        ran: Whether the batch has passed through the forward of the part.
        verification: The comparison of its pairs with Eval mode; None if nobody asked for it.
        sides: What is compared.
        kept_bytes: Bytes kept for the backward pass on both sides; None if they were not counted.
        peak_bytes: The most bytes alive at once in a step of the part alone, on both sides; None as above, and if a
            backward pass of the sum of its outputs fails.
        blocks: The blocks that run again in the backward pass.
        notes: What else there is to say in the table.
    """

    asked: Sequence[str] = ()
    ran: bool = False
    verification: Verification | None = None
    sides: tuple[Side, Side] | None = None
    kept_bytes: list[int] | None = None
    peak_bytes: list[int] | None = None
    blocks: Blocks = field(default_factory=Blocks)
    notes: list[str] = field(default_factory=list)


def print_lines(trainer: Trainer, lines: Sequence[str]) -> None:
    """Print lines in the first process, above the progress bar if there is one."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        (bar.print if bar is not None else rank_zero_info)("\n".join(lines))


def describe(part: ConvertedPart, found: Findings, mode: Mode, eval_mode: Mode) -> list[str]:
    """Return the lines of the table about one part.

    Args:
        part: A converted part.
        found: What the first batch has shown about it.
        mode: The mode that training runs in.
        eval_mode: The mode that evaluation runs in.
    """
    name = f"`{part.path}`" if part.path else "the whole module"
    heading = f"ConvBN: {name} trains in {mode.title()} mode and is evaluated in {eval_mode.title()} mode"
    blocks = () if part.recompute in ("none", "elementwise") else found.blocks.summary()
    body = [*_folding_lines(part, mode, eval_mode), *blocks, *_memory_lines(part, found)]
    verified = found.verification
    if verified is not None and verified.deviation is not None:
        word = "differs from" if verified.wrong else "equals"
        body.append(f"verified: Tune {word} Eval, relative deviation {verified.deviation:.1e}")
    missing = [what for what in found.asked if what != "verified" or verified is None or not verified.compared]
    if missing and not found.ran:
        word = "neither verified nor counted" if len(missing) == 2 else f"not {missing[0]}"
        body.append(f"{word}: the first batch did not pass through its forward")
    return [heading, *(f"  {line}" for line in (*body, *found.notes))]


def _folding_lines(part: ConvertedPart, mode: Mode, eval_mode: Mode) -> list[str]:
    """Say what is folded: in training, in evaluation alone, or in neither. And that the unfrozen stay in Train mode."""
    word, more = "folded", ""
    if mode != "tune" and part.pairs:
        in_evaluation = eval_mode in ("tune", "deploy")
        word, more = (
            ("folded", ", in evaluation alone") if in_evaluation else ("foldable", "; Tune mode would fold them")
        )
    first, *others = part.pairs.summary(word)
    ending = " (in Train mode)" if part.pairs.unfrozen else ""
    return [first + more, *(line + ending if line.startswith("unfrozen") else line for line in others)]


def _memory_lines(part: ConvertedPart, found: Findings) -> list[str]:
    if found.sides is None or found.kept_bytes is None:
        return []
    (without, _, _, _), (name, _, mode, recompute) = found.sides
    recomputing = f" ({_asked(recompute)})" if recompute != "none" and mode != "train" else ""
    in_force = (mode, recompute) == (part.mode, part.recompute)
    before, after = found.kept_bytes
    saved = _change(before, after, "saved") if before else "no parameter wants a gradient"
    keeps, takes = (name, name) if in_force else (f"{name} would keep", f"{name} would take")
    lines = [f"kept for backward: {without} {as_mib(before)}, {keeps} {as_mib(after)}{recomputing}, {saved}"]
    if found.peak_bytes is not None:
        before, after = found.peak_bytes
        change = _change(before, after, "less")
        lines.append(f"peak of a step: {without} {as_mib(before)}, {takes} {as_mib(after)}{recomputing}, {change}")
    return lines


def _asked(recompute: Choice) -> str:
    return f"recompute={recompute if isinstance(recompute, str) else f'{len(recompute)} blocks'}"


def _change(before: int, after: int, less: str) -> str:
    return f"{100 * abs(before - after) / before:.1f} % {'more' if after > before else less}"


def warn_about(part: ConvertedPart, found: Findings) -> None:
    """Warn of pairs that are folded no more or not verified, and of BatchNorms in Train mode.

    There is one warning for one cause, however many pairs it concerns.
    """
    for names, reason in _causes(part.wrong):
        others = f" and {len(names) - 1} more BatchNorms go" if len(names) > 1 else " goes"
        rank_zero_warn(f"ConvBN: `{part.full_name(names[0])}`{others} back to Eval mode: {reason}")
    if found.verification is not None and not found.verification.compared and part.pairs:
        rank_zero_warn(
            f"ConvBN: the folded pairs of `{part.path or 'the module'}` are not verified: none of them ran in the "
            "first batch. Set target=... to the modules that training_step calls, or verify=False"
        )
    untrained = [name for name, reason in part.pairs.unpaired.items() if reason == UNTRAINED]
    if untrained:
        rank_zero_warn(
            f"ConvBN: {len(untrained)} BatchNorm(s) of `{part.path or 'the module'}` stay in Train mode: "
            f"`{untrained[0]}` {UNTRAINED}. Load pretrained weights, or set freeze_untrained=True"
        )


def warn_if_never_reached(start_epoch: int, trainer: Trainer) -> None:
    """Warn if a fit ends before its ``start_epoch``. A ``fast_dev_run`` is meant to."""
    last, tries_out = trainer.max_epochs, trainer.fast_dev_run  # type: ignore[attr-defined]
    if last is not None and 0 <= last <= start_epoch and not tries_out:
        rank_zero_warn(
            f"ConvBN: start_epoch={start_epoch} is not reached: max_epochs={last} ends this fit before, so all of it "
            "trains in Train mode"
        )


def _causes(wrong: Mapping[str, str]) -> list[tuple[list[str], str]]:
    """Group names by reason: the names, and the first one's reason. Reasons that differ in a number are one cause."""
    causes: dict[str, tuple[list[str], str]] = {}
    for name, reason in wrong.items():
        causes.setdefault(_NUMBER_OR_NAME.sub("", reason), ([], reason))[0].append(name)
    return list(causes.values())
