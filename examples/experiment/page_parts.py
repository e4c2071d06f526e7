"""What the pages of the experiments share: rows, tables, names and colours."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

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


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Draw a table. All columns but the first hold numbers."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---", *["---:"] * (len(header) - 1)], *lines)]


def spread(found: Sequence[float]) -> str:
    """Return mean, lowest and highest."""
    return f"{fmean(found):.3f} ({min(found):.3f} to {max(found):.3f})" if found else "-"


def versions(report: dict[str, Any]) -> str:
    """Return the machine and the versions of the runs."""
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['machine']['cpu']}, one thread to a run; {packages}."


def clean(axes: Axes) -> None:
    """Take from a panel what is not needed to read it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="y", color="#e2e8f0")
    axes.set_axisbelow(True)
