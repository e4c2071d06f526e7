"""The tables of `docs/use/train-from-scratch.md`: what `train_mode.py` has measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from examples import results_file
from examples.benchmarks.summary import Row, bytes_ratio, spread_text, time_ratio
from examples.benchmarks.variants import VARIANTS
from lightning_convbn.memory import MIB

RESULTS = results_file.BENCHMARKS / "train_mode.json"
PAGE = results_file.ROOT / "docs" / "use" / "train-from-scratch.md"
OURS = ("train_recompute", "train_blocks")
GAIN_LEAST = 8  # models that the table of the coverage shows
TIMED = (*OURS, "train_checkpoint_blocks")


def write(rows: Sequence[Row]) -> None:
    """Put the table of each part that has rows into the page."""
    PAGE.write_text(with_tables(PAGE.read_text(), rows))


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """Return the page with the tables of the rows."""
    for part, table in TABLES.items():
        if own := [row for row in rows if row["part"] == part]:
            page = results_file.with_table(page, f"train-{part}", list(table(own)))
    return page


def memory(rows: Sequence[Row]) -> Iterator[str]:
    """Kept bytes and peaks in relation to plain training, and by how much the predicted peaks are off."""
    shares = [f"{VARIANTS[name].title}: its share" for name in OURS]
    yield from _head(
        "network",
        "Train keeps",
        *shares,
        "peak of Train",
        *(f"{share} of that" for share in shares),
        "prediction off by",
    )
    for row in rows:
        cells = []
        for what in ("kept_bytes", "peak_without_workspaces"):
            plain = row["train"][what]
            cells += [f"{plain / MIB:.0f} MiB", *(f"{row[name][what] / plain:.2f}" for name in OURS)]
        found = [row[name] for name in ("train", *OURS) if "predicted_peak" in row[name]]
        offs = [100 * abs(one["predicted_peak"] / one["peak_without_workspaces"] - 1) for one in found]
        yield _line(row["model"], *cells, f"{max(offs):.1f} %" if offs else "-")


def steps(rows: Sequence[Row]) -> Iterator[str]:
    """Step times and peaks in relation to plain training."""
    yield from _head("network", *(f"{VARIANTS[name].title}: step | its peak" for name in TIMED))
    for row in rows:
        cells = []
        for name in TIMED:
            step, peak = time_ratio(row, name, "train"), bytes_ratio(row, name, "train", "peak_bytes")
            cells += ["failed", "-"] if step is None or peak is None else [spread_text(step, 2), f"{peak:.2f}"]
        yield _line(row["model"], *cells)


def coverage(rows: Sequence[Row]) -> Iterator[str]:
    """Kept bytes in relation to plain training: of the models that gain least, and of the one in the middle."""
    yield from _head(f"of {len(rows)} models", "Train keeps", *(f"{VARIANTS[name].title}: its share" for name in OURS))
    ranked = sorted(rows, key=lambda row: row[OURS[0]] / row["train"], reverse=True)
    shown = [(row["model"], row) for row in ranked[:GAIN_LEAST]]
    for title, row in [*shown, (f"{ranked[len(ranked) // 2]['model']}, the median", ranked[len(ranked) // 2])]:
        ratios = [f"{row[name] / row['train']:.2f}" for name in OURS]
        yield _line(title, f"{row['train'] / MIB:.0f} MiB", *ratios)


def fits(rows: Sequence[Row]) -> Iterator[str]:
    """The peak of a plain fit, the budget and the peak within it."""
    yield from _head("network", "peak of the plain fit", "budget", "peak within it", "losses")
    for row in rows:
        sizes = [f"{row[key] / MIB:.0f} MiB" for key in ("plain_peak", "budget", "peak")]
        yield _line(row["model"], *sizes, "equal" if row["equal"] else "**differ**")


def epoch(rows: Sequence[Row]) -> Iterator[str]:
    """The test scores, and whether all is that of plain training."""
    yield from _head("`recompute`", "test accuracy", "weights, statistics and scores")
    for row in rows:
        yield _line(row["recompute"], f"{row['accuracy']:.4f}", "equal" if row["equal"] else "**differ**")


TABLES: dict[str, Callable[[Sequence[Row]], Iterator[str]]] = {
    "memory": memory,
    "steps": steps,
    "coverage": coverage,
    "fits": fits,
    "epoch": epoch,
}


def _head(first: str, *others: str) -> Iterator[str]:
    line = _line(first, *others)
    yield line
    yield "|---|" + "---:|" * (line.count(" | "))


def _line(*cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
