"""Write the page of the docs about all modes, with its pictures, from what `all_modes.py` has measured.

    python examples/benchmarks/write_pages.py

writes `docs/benchmarks/modes.md` and its pictures from `docs/benchmarks/modes.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.benchmarks import modes_page, trade_off
from examples.benchmarks.summary import Row, bytes_ratio, time_ratio
from examples.benchmarks.variants import VARIANTS
from examples.results_file import BENCHMARKS
from lightning_convbn.exporting.atomic_file import atomic_write

# One opaque panel with dark text: it reads the same on a light and on a dark page.
PANEL, TEXT, GRID = "#f8fafc", "#1e293b", "#dbe2ea"


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = BENCHMARKS / "modes.json"
    parser.add_argument("--modes", type=Path, default=modes, help="what all_modes.py has measured (%(default)s)")
    arguments = parser.parse_args()
    if not arguments.modes.exists():
        parser.error(f"{arguments.modes} does not exist; write it with examples/benchmarks/all_modes.py")
    measurements = json.loads(arguments.modes.read_text())
    page = arguments.modes.with_suffix(".md")
    page.write_text(modes_page.as_markdown(measurements, arguments.modes.stem))
    written = [page]
    for name, rows in modes_page.pictures(measurements["rows"], arguments.modes.stem).items():
        written.append(_save(compare(rows), page.with_name(name)))
        if len(rows) >= modes_page.LEAST_NETWORKS:
            written.append(_save(peak_against_time(rows), page.with_name(modes_page.trade_off_picture(name))))
    print("wrote", *written, sep="\n  ")


def compare(rows: Sequence[Row]) -> Figure:
    """Draw what each network keeps, its peak and its step time, relative to the Deploy copy's, variant by variant."""
    figure = Figure(figsize=(15, 1.9 + 0.5 * len(rows)), layout="constrained", dpi=120, facecolor=PANEL)
    kept, peak, time = figure.subplots(1, 3, sharey=True)
    names = [name for name in VARIANTS if any(name in row["variants"] for row in rows)]
    for place, name in enumerate(names):
        offset = 0.7 * (place / max(1, len(names) - 1) - 0.5)
        for axes, what in ((kept, "kept_bytes"), (peak, "peak_bytes")):
            found = [(bytes_ratio(row, name, "deploy", what), number + offset) for number, row in enumerate(rows)]
            _dots(axes, name, [point for point in found if point[0] is not None])
        spreads = [(time_ratio(row, name, "deploy"), number + offset) for number, row in enumerate(rows)]
        timed = [(spread, height) for spread, height in spreads if spread is not None]
        _dots(time, name, [(spread.median, height) for spread, height in timed])
        for spread, height in timed:
            time.plot([spread.lower, spread.upper], [height, height], color=VARIANTS[name].colour, linewidth=1.5)
    for axes, label in ((kept, "kept for backward"), (peak, "peak of forward and backward"), (time, "step time")):
        _plain(axes, f"{label}, relative to the Deploy copy")
        axes.axvline(1, color="#64748b", linewidth=1)
        axes.grid(axis="x", color=GRID)
        for number in range(1, len(rows)):
            axes.axhline(number - 0.5, color=GRID, linewidth=0.8)
    kept.set_xscale("log", base=2)  # checkpointing keeps a tenth, folded weights a hundredfold of it at small images
    kept.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    kept.set_yticks(range(len(rows)), [row["model"] for row in rows])
    kept.set_ylim(len(rows) - 0.4, -0.6)
    handles, labels = kept.get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": TEXT}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend), columnspacing=1.2, **style)
    return figure


def peak_against_time(rows: Sequence[Row]) -> Figure:
    """Draw the points of each network, relative to Eval mode: ours joined by a line, and those of other tools."""
    columns = 4
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(15, 0.9 + 3 * lines), layout="constrained", dpi=110, facecolor=PANEL)
    grid = [*figure.subplots(lines, columns, squeeze=False).flat]
    for axes, row in zip(grid, rows, strict=False):
        _plain(axes, "peak / Eval's peak")
        axes.set_title(row["model"], color=TEXT, fontsize=11)
        axes.set_ylabel("step / Eval's step", color=TEXT)
        axes.grid(color=GRID)
        ours = sorted(trade_off.points(row, trade_off.OURS), key=lambda point: point.peak)
        line = [point.peak for point in ours], [point.step.median for point in ours]
        axes.plot(*line, color=VARIANTS["tune"].colour, marker="o", label="Tune: none, elementwise, budgets, blocks")
        for point in trade_off.points(row, trade_off.PEERS):
            variant = VARIANTS[point.variant]
            style: dict[str, Any] = {"marker": "D" if variant.compiled else "s", "label": variant.title}
            axes.scatter([point.peak], [point.step.median], s=34, color=variant.colour, **style)
    for axes in grid[len(rows) :]:
        axes.set_visible(False)
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    legend = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    style = {"frameon": False, "fontsize": 9, "labelcolor": TEXT}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=5, **style)
    return figure


def _dots(axes: Axes, name: str, points: Sequence[tuple[float | None, float]]) -> None:
    if points:
        ratios, heights = zip(*points, strict=True)
        marker = "D" if VARIANTS[name].compiled else "o"
        axes.scatter(ratios, heights, s=34, marker=marker, color=VARIANTS[name].colour, label=VARIANTS[name].title)


def _plain(axes: Axes, label: str) -> None:
    axes.set_facecolor(PANEL)
    axes.set_xlabel(label, color=TEXT)
    axes.tick_params(colors=TEXT, length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as file:
        figure.savefig(file)
    return path


if __name__ == "__main__":
    main()
