"""What the pages of the experiments share: rows, tables, names, colours and the command line."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.results_file import BENCHMARKS, fill, markdown_table, moved_scripts
from lightning_convbn.command.plot import COLOURS

TITLES = {"train": "Train", "eval": "Eval", "tune": "Tune", "deploy": "Deploy, trained"}
NAMES = {
    "mobilenet_v2": "MobileNetV2",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "elpv": "ELPV",
    "fashion-mnist": "Fashion-MNIST",
}
CHANCE = {"elpv": 1 / 2, "fashion-mnist": 1 / 10}
MODE_COLOURS = {"train": "#7c3aed", "eval": COLOURS["eval"], "tune": COLOURS["tune"], "deploy": COLOURS["deploy-copy"]}
INK = "#1e293b"
GREY = "#64748b"


Row = dict[str, Any]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def values(rows: Iterable[Row], name: str) -> list[Any]:
    """Return the different values of a column, in their order in the rows."""
    return list(dict.fromkeys(row[name] for row in rows))


def accuracies(rows: Iterable[Row], **wanted: Any) -> list[float]:
    """Return the accuracies of the rows that have these values; a diverged run's is chance."""
    return [row["accuracy"] for row in select(rows, **wanted)]


def panels(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield each pair of a network and a data set that has rows."""
    for net, data in itertools.product(NAMES, NAMES):
        if select(rows, net=net, data=data):
            yield net, data


def twins(rows: Sequence[Row], mode: str, other: str, place: Sequence[str]) -> list[tuple[Row, Row]]:
    """Pair each run in one mode with the run in another mode that has the same values in the columns of ``place``."""
    others = {tuple(row[name] for name in place): row for row in select(rows, mode=other)}
    found = [(row, others.get(tuple(row[name] for name in place))) for row in select(rows, mode=mode)]
    return [(row, twin) for row, twin in found if twin is not None]


def tables_of_panels(
    rows: Sequence[Row], header: Sequence[str], cells: Callable[[list[Row]], list[list[str]]]
) -> list[str]:
    """Draw a table for each network and data set, from its rows."""
    lines = []
    for net, data in panels(rows):
        chosen = select(rows, net=net, data=data)
        lines += ["", f"**{NAMES[net]} on {NAMES[data]}**", "", *markdown_table(header, cells(chosen))]
    return lines[1:]


def spread(found: Sequence[float]) -> str:
    """Return mean, lowest and highest."""
    return f"{fmean(found):.3f} ({min(found):.3f} to {max(found):.3f})" if found else "-"


def facts(report: dict[str, Any], *settings: str) -> list[str]:
    """Return the command, the seeds and settings, the machine and the versions of the runs."""
    rows = report["rows"]
    seeds = ", ".join(f"{seed} ({len(select(rows, seed=seed))} runs)" for seed in sorted(values(rows, "seed")))
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [
        f"`{report['command']}`",
        *moved_scripts([report["command"]]),
        "",
        f"{len(rows)} runs: seeds {seeds}; {settings[0]}",
        *settings[1:],
        f"{report['machine']['cpu']}, one thread to a run; {packages}.",
    ]


def write_page(
    page: Path,
    results: Path,
    tables: Callable[[dict[str, Any]], Mapping[str, Sequence[str]]],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """Read the command line of a script that fills in a page and draws its figures.

    Args:
        page: The page, by default.
        results: The file of the runs, by default.
        tables: From what is in that file to the tables, by their marks in the page.
        draw: Draws the figures into a folder.
    """
    parser = argparse.ArgumentParser(description=f"Fill in {page.name}.")
    parser.add_argument("--results", type=Path, default=results, help="the runs (%(default)s)")
    parser.add_argument("--page", type=Path, default=page, help="the page whose tables are filled in (%(default)s)")
    parser.add_argument("--figures", type=Path, default=BENCHMARKS, help="folder of the figures (%(default)s)")
    args = parser.parse_args()
    report = json.loads(args.results.read_text())
    fill(args.page, tables(report))
    draw(report, args.figures)
    print(f"wrote {args.page} and its figures in {args.figures}")


def draw_accuracies(
    rows: Sequence[Row],
    path: Path,
    draw: Callable[[Axes, list[Row]], float],
    *,
    across: str,
    dpi: int,
    legend: dict[str, Any],
) -> None:
    """Draw a panel of accuracies for each network and data set, with the accuracy of chance.

    Args:
        rows: The runs.
        path: The file.
        draw: Draws the runs of one panel; returns the smallest value of its horizontal axis.
        across: What that axis shows.
        dpi: Pixels per inch.
        legend: Options of the legend.
    """
    shown = [*panels(rows)]
    lines, columns = math.ceil(len(shown) / 2), min(2, len(shown))
    figure = Figure(figsize=(9, 3.2 * lines + 0.6), layout="constrained", dpi=dpi, facecolor="white")
    grid = figure.subplots(lines, columns, squeeze=False, sharey="col")
    for axes, (net, data) in zip(grid.flat, shown, strict=False):
        least = draw(axes, select(rows, net=net, data=data))
        axes.axhline(CHANCE[data], color=GREY, linewidth=0.8)
        axes.annotate("chance", (least, CHANCE[data]), (0, 3), textcoords="offset points", fontsize=8, color=GREY)
        axes.minorticks_off()
        axes.set_title(f"{NAMES[net]}, {NAMES[data]}", fontsize=10, color=INK)
        clean(axes)
    figure.supxlabel(across, fontsize=10, color=INK)
    figure.supylabel("balanced test accuracy", fontsize=10, color=INK)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, **{"ncols": len(labels), **legend})
    figure.savefig(path, metadata={"Software": None})


def clean(axes: Axes) -> None:
    """Take from a panel what is not needed to read it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="y", color="#e2e8f0")
    axes.set_axisbelow(True)
