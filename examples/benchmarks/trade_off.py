"""Peak against step time: the points of this package beside those of other tools, and which of them is beaten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from examples.benchmarks.summary import Row, Spread, bytes_ratio, measured, time_ratio
from examples.benchmarks.variants import BUDGETS, COMPILED_BUDGETS, INDUCTOR_PASS, VARIANTS, budget_name

OURS = ("tune", "tune_recompute", *map(budget_name, BUDGETS), "tune_blocks")
PEERS = ("eval", "mmengine", "checkpoint", "checkpoint_blocks", INDUCTOR_PASS, "compiled", *COMPILED_BUDGETS)


class Point(NamedTuple):
    """A variant of a cell, relative to Eval mode.

    Attributes:
        variant: Its name.
        peak: Its peak over Eval's.
        step: Its step time over Eval's.
    """

    variant: str
    peak: float
    step: Spread


def points(row: Row, variants: Sequence[str]) -> list[Point]:
    """Return the points of those variants that were measured in a cell."""
    found = []
    for variant in variants:
        peak, step = bytes_ratio(row, variant, "eval", "peak_bytes"), time_ratio(row, variant, "eval")
        if peak is not None and step is not None:
            found.append(Point(variant, peak, step))
    return found


def beaten(row: Row) -> Iterator[tuple[str, str]]:
    """Yield each variant of ours with each peer that has a lower peak and, beyond the quartiles, a shorter step."""
    for ours in OURS:
        for peer in PEERS:
            own, other = measured(row, ours), measured(row, peer)
            if own is None or other is None or other["peak_bytes"] >= own["peak_bytes"]:
                continue
            ratio = time_ratio(row, peer, ours)
            if ratio is not None and ratio.upper < 1:
                yield ours, peer


def section(rows: Sequence[Row], picture: str) -> Iterator[str]:
    """Yield the lines of the section about peak against step time."""
    yield "### Peak against step time"
    yield ""
    yield f"![Peak against step time, both relative to Eval mode]({picture})"
    yield ""
    yield "The line joins what this package offers, from no recomputation to all blocks. Lower left is better."
    yield "A tool beats a point of ours if its peak is lower and its step is shorter beyond the quartiles:"
    yield ""
    losses = [
        f"- {row['model']}: {VARIANTS[peer].title} beats {VARIANTS[ours].title} (peak "
        f"{bytes_ratio(row, peer, ours, 'peak_bytes'):.2f}, step {time_ratio(row, peer, ours).median:.2f} of it)"  # type: ignore[union-attr]
        for row in rows
        for ours, peer in beaten(row)
    ]
    yield from losses or ["- none does."]
