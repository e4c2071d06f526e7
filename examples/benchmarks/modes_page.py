"""The tables and the picture of `docs/benchmarks/modes.md`, from what `all_modes.py` has measured.

    python examples/benchmarks/modes_page.py

fills in the page and draws `modes.png`. Every cell is in `modes.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from examples.benchmarks.summary import Row, Spread, bytes_ratio, measured, notes, time_ratio, title
from examples.benchmarks.variants import BUDGETS, COMPILED_BUDGETS, INDUCTOR_PASS, VARIANTS, budget_name
from examples.results_file import BENCHMARKS, fill, markdown_table
from lightning_convbn.exporting.atomic_file import atomic_write
from lightning_convbn.memory import MIB

PAGE = BENCHMARKS / "modes.md"
RESULTS = BENCHMARKS / "modes.json"
PICTURE = BENCHMARKS / "modes.png"
# One opaque panel with dark text: it reads the same on a light and on a dark page.
PANEL, TEXT, GRID = "#f8fafc", "#1e293b", "#dbe2ea"
PLAN = ("tune", "tune_recompute", "tune_blocks")  # from no recomputation to all of it
OURS = (*PLAN, *map(budget_name, BUDGETS))
PEERS = ("eval", "mmengine", "checkpoint", "checkpoint_blocks", INDUCTOR_PASS, "compiled", *COMPILED_BUDGETS)
SHOWN = (*PLAN, "checkpoint", "checkpoint_blocks", "mmengine")  # the columns of the table
LOSSES = (  # ours, theirs, what may be more than theirs
    ("tune", "eval", "step"),
    ("tune", "mmengine", "step"),
    ("tune_recompute", "checkpoint", "peak"),
    ("tune_blocks", "checkpoint", "peak"),
    ("tune_blocks", "checkpoint_blocks", "step"),
)


class Point(NamedTuple):
    """A variant of a row, relative to Eval mode.

    Attributes:
        variant: Its name.
        peak: Its peak over Eval's.
        step: Its step time over Eval's.
    """

    variant: str
    peak: float
    step: Spread


def write() -> list[Path]:
    """Fill in the page and draw the picture; return their paths."""
    measurements = json.loads(RESULTS.read_text())
    return [fill(PAGE, tables(measurements)), draw(measurements["rows"], PICTURE)]


def tables(measurements: Mapping[str, Any]) -> dict[str, list[str]]:
    """Draw the tables of the page, by their marks."""
    rows, machine = measurements["rows"], measurements["machine"]
    known = ", ".join(f"{name} {version}" for name, version in measurements["versions"].items())
    return {
        "facts": [f"Measured on: {machine['cpu']}, {machine['threads']} threads, float32; {known}."],
        "ranges": [*_ranges(rows)],
        "modes": _table(rows),
        "losses": [*_losses(rows), *_beaten(rows)],
        "notes": [f"- {row['model']}, {title(row)}: {note}" for row in rows for note in notes(row)],
    }


def points(row: Row, variants: Sequence[str]) -> list[Point]:
    """Return the points of those variants that were measured."""
    found = []
    for variant in variants:
        peak, step = bytes_ratio(row, variant, "eval", "peak_bytes"), time_ratio(row, variant, "eval")
        if peak is not None and step is not None:
            found.append(Point(variant, peak, step))
    return found


def _ranges(rows: Sequence[Row]) -> Iterator[str]:
    """Say what each variant takes of Eval's peak and step at the largest batch, and Tune at the others."""
    largest, *others = sorted({row["batch"] for row in rows}, reverse=True)
    for batch, variant in [*((largest, variant) for variant in SHOWN), *((batch, "tune") for batch in others)]:
        found = [point for row in rows if row["batch"] == batch for point in points(row, [variant])]
        if found:
            peak, step = _range([one.peak for one in found]), _range([one.step.median for one in found])
            yield f"- {VARIANTS[variant].title}, batch {batch}: peak {peak}, step {step}."


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f} (median {median(ratios):.2f})"


def _table(rows: Sequence[Row]) -> list[str]:
    """Draw Eval's peak and step of each network, and the ratios of the others to them; larger batches first."""
    lines = []
    for row in sorted(rows, key=lambda row: -row["batch"]):
        plain = measured(row, "eval")
        assert plain is not None
        cells = [f"{row['model']}, batch {row['batch']}"]
        cells += [f"{plain['peak_bytes'] / MIB:.0f} MiB, {median(plain['step_ms']):.0f} ms"]
        for variant in SHOWN:
            point = next(iter(points(row, [variant])), None)
            missing = "failed" if variant in row["variants"] else "-"
            cells.append(missing if point is None else f"{point.peak:.2f}, {point.step.median:.2f}")
        lines.append(cells)
    return markdown_table(["network", "Eval", *(VARIANTS[name].title for name in SHOWN)], lines)


def _losses(rows: Sequence[Row]) -> Iterator[str]:
    """Name the networks in which a variant of ours takes more than another one; of a step, beyond the quartiles."""
    for ours, theirs, what in LOSSES:
        lost = []
        for row in rows:
            step, peak = time_ratio(row, ours, theirs), bytes_ratio(row, ours, theirs, "peak_bytes")
            if what == "step" and step is not None and min(round(step.median, 2), step.lower) > 1:
                lost.append(f"{_place(row)} ({step.median:.2f})")
            if what == "peak" and peak is not None and peak > 1:
                lost.append(f"{_place(row)} ({peak:.2f})")
        if lost:
            more = "a longer step" if what == "step" else "a higher peak"
            yield f"- **{VARIANTS[ours].title} has {more} than {VARIANTS[theirs].title}**: {', '.join(lost)}."


def _beaten(rows: Sequence[Row]) -> Iterator[str]:
    """Name the tools that have a lower peak and, beyond the quartiles, a shorter step than a variant of ours."""
    for ours in PLAN:
        lost = [f"{_place(row)} ({', '.join(found)})" for row in rows if (found := [*_better(row, ours)])]
        if lost:
            yield f"- **{VARIANTS[ours].title} is beaten in both peak and step**: {'; '.join(lost)}."


def _better(row: Row, ours: str) -> Iterator[str]:
    for peer in PEERS:
        peak, step = bytes_ratio(row, peer, ours, "peak_bytes"), time_ratio(row, peer, ours)
        if peak is not None and step is not None and peak < 1 and step.upper < 1:
            yield VARIANTS[peer].title.replace(", memory budget", " at budget")


def _place(row: Row) -> str:
    return f"{row['model']} at batch {row['batch']}"


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Draw peak against step time for the networks of the largest batch: ours joined by a line, and other tools."""
    largest = max(row["batch"] for row in rows)
    rows, columns = [row for row in rows if row["batch"] == largest], 4
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(15, 0.9 + 3 * lines), layout="constrained", dpi=110, facecolor=PANEL)
    grid = [*figure.subplots(lines, columns, squeeze=False).flat]
    for axes, row in zip(grid, rows, strict=False):
        axes.set_facecolor(PANEL)
        axes.tick_params(colors=TEXT, length=0)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(color=GRID)
        axes.set_title(row["model"], color=TEXT, fontsize=11)
        axes.set_xlabel("peak / Eval's peak", color=TEXT)
        axes.set_ylabel("step / Eval's step", color=TEXT)
        ours = sorted(points(row, OURS), key=lambda point: point.peak)
        line = [point.peak for point in ours], [point.step.median for point in ours]
        axes.plot(*line, color=VARIANTS["tune"].colour, marker="o", label="Tune: none, elementwise, budgets, blocks")
        for point in points(row, PEERS):
            variant = VARIANTS[point.variant]
            style: dict[str, Any] = {"marker": "D" if variant.compiled else "s", "label": variant.title}
            axes.scatter([point.peak], [point.step.median], s=34, color=variant.colour, **style)
    for axes in grid[len(rows) :]:
        axes.set_visible(False)
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    legend = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    style = {"frameon": False, "fontsize": 9, "labelcolor": TEXT}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=5, **style)
    with atomic_write(path) as file:
        figure.savefig(file)
    return path


if __name__ == "__main__":
    print("wrote", *write(), sep="\n  ")
