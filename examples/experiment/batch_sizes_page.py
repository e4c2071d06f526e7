"""Draw the figure and tables of `docs/benchmarks/batch-size-experiment.md` from the results of `batch_sizes.py`.

python examples/experiment/batch_sizes_page.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from examples.experiment.batch_sizes import RATES_ARE_FOR
from examples.experiment.page_parts import (
    MODE_COLOURS,
    NAMES,
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

PAGE = BENCHMARKS / "batch-size-experiment.md"
RESULTS = BENCHMARKS / "batch_sizes.json"
FIGURE = "batch-sizes-accuracy.png"
CLEAR = 0.02
"""One mode is clearly better if its mean accuracy is higher by this much, and every seed's is higher."""
AGAIN = "measured again"
"""Train mode, tested with statistics that are measured again after training."""
HOLLOW: dict[str, Any] = {"marker": "o", "markerfacecolor": "white"}


class Batch(NamedTuple):
    """Images per forward pass, and batches per step of the optimizer."""

    batch_size: int
    accumulate: int

    def __str__(self) -> str:
        """Return it as the tables show it."""
        return str(self.batch_size) if self.accumulate == 1 else f"{self.batch_size} × {self.accumulate}"


def batches(rows: Iterable[Row]) -> list[Batch]:
    """Return all batches of the rows, those without accumulation first."""
    found = {Batch(row["batch_size"], row["accumulate"]) for row in rows}
    return sorted(found, key=lambda batch: (batch.accumulate > 1, batch.batch_size))


def measured_again(rows: Iterable[Row]) -> list[Row]:
    """Return Train runs with the accuracy that they have after their statistics are measured again."""
    return [
        {**row, "mode": AGAIN, "accuracy": row.get("accuracy_measured_again", row["accuracy"])}
        for row in select(rows, mode="train")
    ]


def gains(rows: Iterable[Row], over: str = "train", **wanted: Any) -> list[float]:
    """Return by how much Tune is more accurate than another mode, run by run of the same settings."""
    pairs = twins(select(rows, **wanted), "tune", over, ("net", "data", "seed", "batch_size", "accumulate"))
    return [row["accuracy"] - other["accuracy"] for row, other in pairs]


def better(found: Sequence[float]) -> str:
    """Return which mode is clearly better by these gains of Tune: `Tune`, `Train` or `neither`."""
    if len(found) > 1 and abs(fmean(found)) >= CLEAR:
        if min(found) > 0:
            return "Tune"
        if max(found) < 0:
            return "Train"
    return "neither"


def counts(rows: Sequence[Row], shown: Iterable[Batch], over: str = "train") -> dict[str, int]:
    """Count in how many pairs of a network and a data set which mode is clearly better."""
    batch_list = [*shown]
    verdicts = [
        better(gains(rows, over, net=net, data=data, **batch._asdict()))
        for net, data in panels(rows)
        for batch in batch_list
    ]
    return {verdict: verdicts.count(verdict) for verdict in ("Tune", "Train", "neither")}


def batch_table(rows: Sequence[Row]) -> list[str]:
    """Draw for each batch how often which mode is clearly better, and by how much Tune is."""
    every, lines = [*rows, *measured_again(rows)], []
    for batch in batches(rows):
        found = counts(every, [batch])
        means = [f"{fmean(gains(every, over, **batch._asdict())):+.3f}" for over in ("train", AGAIN)]
        lines.append([str(batch), *map(str, found.values()), *means])
    header = ["batch", "Tune better", "Train better", "neither", "Tune − Train", f"Tune − Train, {AGAIN}"]
    return markdown_table(header, lines)


def accuracy_tables(rows: Sequence[Row]) -> list[str]:
    """Draw a table of accuracies for each network and data set."""

    def cells(every: list[Row]) -> list[list[str]]:
        lines = []
        for batch in batches(every):
            chosen = select(every, **batch._asdict())
            found = gains(chosen)
            shown = [spread(accuracies(chosen, mode=mode)) for mode in ("train", AGAIN, "tune")]
            lines.append([str(batch), *shown, f"{fmean(found):+.3f}" if found else "-", better(found)])
        return lines

    header = ["batch", "Train", f"Train, {AGAIN}", "Tune", "Tune − Train", "clearly better"]
    return tables_of_panels([*rows, *measured_again(rows)], header, cells)


def plain_table(rows: Sequence[Row]) -> list[str]:
    """Draw the plain accuracy where it is not the balanced one: where classes differ in size."""
    lines = []
    for net, data in panels(rows):
        chosen = select(rows, net=net, data=data)
        if all(abs(row["plain_accuracy"] - row["accuracy"]) < 1e-3 for row in chosen):
            continue
        for batch in batches(chosen):
            runs = [select(chosen, mode=mode, **batch._asdict()) for mode in ("train", "tune")]
            found = [spread([row["plain_accuracy"] for row in some]) for some in runs]
            lines.append([f"{NAMES[net]}, {NAMES[data]}: {batch}", *found])
    return markdown_table(["network, data: batch", "Train", "Tune"], lines)


def against_freezing(rows: Sequence[Row]) -> list[str]:
    """List the cases in which Train mode is clearly better, as it is or with its statistics measured again."""
    every, lines = [*rows, *measured_again(rows)], []
    for net, data in panels(rows):
        for batch in batches(rows):
            chosen = select(every, net=net, data=data, **batch._asdict())
            for over, name in (("train", "Train"), (AGAIN, f"Train, {AGAIN}")):
                if better(found := gains(chosen, over)) == "Train":
                    case = f"{NAMES[net]}, {NAMES[data]}, batch {batch}: {name}"
                    means = [f"{fmean(accuracies(chosen, mode=mode)):.3f}" for mode in (over, "tune")]
                    lines.append([case, *means, f"{-fmean(found):+.3f}"])
    if not lines:
        return ["Train mode is clearly better in no case, not even with its statistics measured again."]
    return markdown_table(["case", "Train mode", "Tune", "Train − Tune"], lines)


def eval_table(rows: Sequence[Row]) -> list[str]:
    """Draw how far Tune is from Eval in the cells that ran in both."""
    lines = []
    for batch in batches(select(rows, mode="eval")):
        found = gains(rows, "eval", **batch._asdict())
        largest = max(map(abs, found))
        lines.append([str(batch), str(len(found)), f"{fmean(found):+.3f}", f"{largest:.3f}"])
    return markdown_table(["batch", "pairs", "Tune − Eval, mean", "largest"], lines)


def tables(report: dict[str, Any]) -> dict[str, list[str]]:
    """Draw the facts and tables of the page, by their marks."""
    rows, settings = report["rows"], report["settings"]
    ran = facts(
        report,
        f"{settings['limit']} training images of {settings['image_size']} px,",
        f"epochs {settings['epochs']}; learning rates for {RATES_ARE_FOR} images per step:",
        f"backbone {settings['lr']:g}, head {settings['head_lr']:g}; runs that diverged:"
        f" {sum(row['diverged'] for row in rows)}.",
    )
    return {
        "batches": batch_table(rows),
        "against": against_freezing(rows),
        "facts": ran,
        "accuracy": accuracy_tables(rows),
        "plain": plain_table(rows),
        "eval": eval_table(rows),
    }


def draw(report: dict[str, Any], folder: Path) -> None:
    """Draw accuracy against batch size: means as lines, the range over the seeds as bands."""
    legend = {"ncols": 3, "fontsize": 9}
    path, across = folder / FIGURE, "images per forward pass"
    draw_accuracies(report["rows"], path, _draw_panel, across=across, dpi=130, legend=legend)


def _draw_panel(axes: Axes, rows: Sequence[Row]) -> float:
    train, tune = MODE_COLOURS["train"], MODE_COLOURS["tune"]
    alone = select([*rows, *measured_again(rows)], accumulate=1)
    largest = max(values(rows, "batch_size"))  # it fills a step: accumulated and alone are the same
    added = [row for row in rows if row["accumulate"] > 1 or row["batch_size"] == largest]
    _draw_curve(axes, select(alone, mode="train"), "Train", train, marker="^", band=True)
    _draw_curve(axes, select(alone, mode=AGAIN), f"Train, {AGAIN}", train, marker="x", linestyle=":")
    _draw_curve(axes, select(added, mode="train"), "Train, accumulated", train, linestyle="--", **HOLLOW)
    _draw_curve(axes, select(alone, mode="tune"), "Tune", tune, marker="s", band=True)
    _draw_curve(axes, select(added, mode="tune"), "Tune, accumulated", tune, linestyle="--", **HOLLOW)
    sizes = sorted(values(rows, "batch_size"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [*map(str, sizes)])
    return float(sizes[0])


def _draw_curve(axes: Axes, rows: Sequence[Row], label: str, colour: str, *, band: bool = False, **style: Any) -> None:
    sizes = sorted(values(rows, "batch_size"))
    runs = [accuracies(rows, batch_size=size) for size in sizes]
    axes.plot(sizes, [*map(fmean, runs)], color=colour, label=label, **style)
    if band:
        axes.fill_between(sizes, [*map(min, runs)], [*map(max, runs)], color=colour, alpha=0.13, linewidth=0)


if __name__ == "__main__":
    write_page(PAGE, RESULTS, tables, draw)
