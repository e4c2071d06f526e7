"""Draw the figures and tables of `docs/benchmarks/stability-experiment.md` from the results of `compare_modes.py`.

python examples/experiment/write_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from matplotlib.axes import Axes

from examples.experiment.page_parts import (
    CHANCE,
    MODE_COLOURS,
    NAMES,
    TITLES,
    Row,
    accuracies,
    draw_accuracies,
    facts,
    panels,
    select,
    spread,
    tables_of_panels,
    twins,
    values,
    write_page,
)
from examples.results_file import BENCHMARKS, markdown_table

PAGE = BENCHMARKS / "stability-experiment.md"
RESULTS = BENCHMARKS / "compare_modes.json"
FIGURE = "compare-modes-accuracy.png"
IN_DOUBLE = BENCHMARKS / "compare_modes_float64.json"
SETTINGS = ("net", "data", "seed", "lr")
"""What two runs have in common that differ in their mode alone."""
COLLAPSED = 0.05
"""A run whose accuracy is above chance by less than this has learnt nothing, or lost it all."""
STYLES = {"train": ":", "eval": "-", "tune": "--", "deploy": "-."}
MARKERS = {"train": "^", "eval": "o", "tune": "s", "deploy": "D"}


def has_collapsed(row: Row) -> bool:
    """Return whether a run is hardly better than chance."""
    return bool(row["diverged"] or row["accuracy"] < CHANCE[row["data"]] + COLLAPSED)


def modes_of(rows: Iterable[Row]) -> list[str]:
    """Return the modes that the rows have, in the order of the paper."""
    found = {row["mode"] for row in rows}
    return [mode for mode in TITLES if mode in found]


def accuracy_tables(rows: Sequence[Row]) -> list[str]:
    """Draw a table of accuracies for each network and data set."""
    modes = modes_of(rows)

    def cells(chosen: list[Row]) -> list[list[str]]:
        rates = sorted(values(chosen, "lr"))
        return [[f"{lr:g}", *(spread(accuracies(chosen, lr=lr, mode=mode)) for mode in modes)] for lr in rates]

    return tables_of_panels(rows, ["learning rate", *(TITLES[mode] for mode in modes)], cells)


def stability_table(rows: Sequence[Row]) -> list[str]:
    """Draw the best learning rate for each network, data set and mode, and how many runs have collapsed."""
    lines = []
    for net, data in panels(rows):
        for mode in modes_of(select(rows, net=net, data=data)):
            chosen = select(rows, net=net, data=data, mode=mode)
            means = {lr: fmean(accuracies(chosen, lr=lr)) for lr in sorted(values(chosen, "lr"))}
            best = max(means, key=lambda lr: means[lr])
            near = max(lr for lr in means if means[lr] > means[best] - COLLAPSED)
            lines.append(
                [
                    f"{NAMES[net]}, {NAMES[data]}: {TITLES[mode]}",
                    f"{means[best]:.3f}",
                    f"{best:g}",
                    f"{near:g}",
                    f"{sum(map(has_collapsed, chosen))} of {len(chosen)}",
                    str(sum(row["diverged"] for row in chosen)),
                ]
            )
    header = [
        "network, data: mode",
        "best mean",
        "at rate",
        f"within {COLLAPSED} of it up to",
        "collapsed",
        "not finite",
    ]
    return markdown_table(header, lines)


def collapse_table(rows: Sequence[Row]) -> list[str]:
    """Draw how many runs of each mode have collapsed at each learning rate."""
    lines = []
    for lr in sorted(values(rows, "lr")):
        chosen = [select(rows, lr=lr, mode=mode) for mode in modes_of(rows)]
        lines.append([f"{lr:g}", *(f"{sum(map(has_collapsed, runs))} of {len(runs)}" for runs in chosen)])
    return markdown_table(["learning rate", *(TITLES[mode] for mode in modes_of(rows))], lines)


def twins_table(rows: Sequence[Row]) -> list[str]:
    """Draw how far runs in Tune mode differ from runs in Eval mode with the same seed, for each rate."""
    lines = []
    for lr in sorted(values(rows, "lr")):
        pairs = twins(select(rows, lr=lr), "tune", "eval", SETTINGS)
        if not pairs:
            continue
        losses = [
            median(abs(tune[name] / other[name] - 1) for tune, other in pairs if tune[name] and other[name])
            for name in ("first_loss", "tenth_loss")
        ]
        differences = [tune["accuracy"] - other["accuracy"] for tune, other in pairs]
        mean, largest = f"{fmean(differences):+.3f}", f"{max(map(abs, differences)):.3f}"
        lines.append([f"{lr:g}", str(len(pairs)), *(f"{loss:.0e}" for loss in losses), mean, largest])
    header = ["learning rate", "pairs", "first loss apart", "tenth loss apart", "accuracy apart, mean", "largest"]
    return markdown_table(header, lines)


def cost_table(report: dict[str, Any]) -> list[str]:
    """Draw memory and time of each network in each mode."""
    rows, lines = report["rows"], []
    for net, kept in report["kept_mib"].items():
        for mode in modes_of(select(rows, net=net)):
            low, middle, high = times(rows, net, mode)
            saved = 100 * (1 - kept[mode] / kept["eval"])
            pairs = twins(select(rows, net=net), mode, "eval", SETTINGS)
            ratio = median(row["cpu_ms_per_step"] / other["cpu_ms_per_step"] for row, other in pairs) if pairs else None
            cells = [f"{kept[mode]:.1f}", f"{round(saved)} %", f"{middle:.0f} ({low:.0f} to {high:.0f})"]
            lines.append([f"{NAMES[net]}: {TITLES[mode]}", *cells, "-" if ratio is None else f"{ratio:.2f}"])
    return markdown_table(["network: mode", "kept, MiB", "less than Eval", "CPU ms per step", "to Eval's"], lines)


def times(rows: Iterable[Row], net: str, mode: str) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile of the CPU milliseconds per step."""
    found = [row["cpu_ms_per_step"] for row in select(rows, net=net, mode=mode)]
    low, _, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return low, median(found), high


def facts_of_grid(report: dict[str, Any]) -> list[str]:
    """Return what was run, where and with which versions."""
    settings = report["settings"]
    rates = ", ".join(f"{lr:g}" for lr in sorted(values(report["rows"], "lr")))
    return facts(
        report,
        f"learning rates of the backbone {rates};",
        f"{settings['limit']} training images of {settings['image_size']} px,",
        f"batch {settings['batch_size']}, epochs {settings['epochs']}.",
    )


def scales_table(report: dict[str, Any]) -> list[str]:
    """Draw the quartiles of the factors by which folding multiplies the weights of a channel."""
    lines = [
        [NAMES[net], *(f"{factor:.2f} (squared {factor * factor:.2f})" for factor in quartiles)]
        for net, quartiles in report["scale_quartiles"].items()
    ]
    return markdown_table(["network", "lower quartile", "median", "upper quartile"], lines)


def tables(report: dict[str, Any]) -> dict[str, list[str]]:
    """Draw the tables of the page, by their marks. The runs in float64 have their own."""
    rows, in_double = report["rows"], json.loads(IN_DOUBLE.read_text())
    return {
        "facts": facts_of_grid(report),
        "accuracy": accuracy_tables(rows),
        "collapse": collapse_table(rows),
        "stability": stability_table(rows),
        "tune-eval": twins_table(rows),
        "float64": [*facts_of_grid(in_double), "", *twins_table(in_double["rows"])],
        "scales": scales_table(report),
        "cost": cost_table(report),
    }


def draw(report: dict[str, Any], folder: Path) -> None:
    """Draw accuracy against learning rate: means as lines, the range as bands."""
    across, path = "learning rate of the backbone", folder / FIGURE
    draw_accuracies(report["rows"], path, _draw_panel, across=across, dpi=150, legend={"fontsize": 10})


def _draw_panel(axes: Axes, rows: Sequence[Row]) -> float:
    for mode in modes_of(rows):
        rates = sorted(values(select(rows, mode=mode), "lr"))
        runs = [accuracies(rows, lr=lr, mode=mode) for lr in rates]
        colour, style = MODE_COLOURS[mode], STYLES[mode]
        axes.fill_between(rates, [*map(min, runs)], [*map(max, runs)], color=colour, alpha=0.13, linewidth=0)
        axes.plot(rates, [*map(fmean, runs)], style, color=colour, label=TITLES[mode], marker=MARKERS[mode])
    rates = sorted(values(rows, "lr"))
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    return float(rates[0])


if __name__ == "__main__":
    write_page(PAGE, RESULTS, tables, draw)
