"""The tables of `docs/scale.md`: growth along batch, resolution and depth, and what several processes add."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import report
import torchvision
from benchmark_results import SETTING, Row, Spread, measured, spread_text, time_ratio
from benchmark_variants import VARIANTS
from torch import nn

from lightning_convbn.memory import MIB

PAGE = report.ROOT / "docs" / "scale.md"
PROCESSES = report.BENCHMARKS / "processes.json"
AXES = {"images in a batch": "batch", "pixels": "pixels", "network": "model"}
SHOWN = ("eval", "tune", "deploy")
SYNCHRONIZED = ("resnet18", "resnet50", "resnet101")
FLOAT_BYTES = 4


def along(rows: Sequence[Row], key: str) -> list[Row]:
    """Return the rows that differ from the one measured in the middle of all axes in nothing but ``key``."""
    middle = {one: Counter(row[one] for row in rows).most_common(1)[0][0] for one in SETTING}
    chosen = [row for row in rows if all(row[one] == middle[one] for one in SETTING if one != key)]
    if key != "model":
        return sorted(chosen, key=lambda row: row[key])
    return sorted(chosen, key=lambda row: row["variants"]["eval"]["resident_bytes"])


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """Fill the page's tables."""
    for key in AXES.values():
        page = report.with_table(page, key, list(growth_table(rows, key)))
    page = report.with_table(page, "setting", list(setting(rows)))
    page = report.with_table(page, "sync", list(sync_table()))
    return report.with_table(page, "processes", list(processes_table(json.loads(PROCESSES.read_text()))))


def setting(rows: Sequence[Row]) -> Iterator[str]:
    """Say what does not change along the axes."""
    middle = along(rows, "batch")[0]
    rounds = f"{middle['rounds']} interleaved rounds"
    batch = Counter(row["batch"] for row in rows).most_common(1)[0][0]
    yield f"Where nothing else is said: {middle['model']}, batch {batch}, {middle['pixels']} px,"
    yield f"{middle['precision']}, {middle['device']}, {rounds}."


def growth_table(rows: Sequence[Row], key: str) -> Iterator[str]:
    """Draw what is kept and how long a step takes along one axis."""
    kept = [f"{VARIANTS[name].title} kept, MiB" for name in SHOWN]
    steps = [f"{VARIANTS[name].title} step, ms" for name in SHOWN]
    yield f"| {key} | {' | '.join([*kept, 'Tune / Eval', *steps, 'Tune / Eval (quartiles)'])} |"
    yield "|---|" + "---:|" * (2 * len(SHOWN) + 2)
    for row in along(rows, key):
        found = [one for name in SHOWN if (one := measured(row, name)) is not None]
        of_eval, of_tune = found[0], found[1]
        ratio = time_ratio(row, "tune", "eval") or Spread(1, 1, 1)
        cells = [f"{one['kept_bytes'] / MIB:.1f}" for one in found]
        cells += [f"{of_tune['kept_bytes'] / of_eval['kept_bytes']:.2f}"]
        cells += [f"{median(one['step_ms']):.0f}" for one in found]
        yield f"| {row[key]} | {' | '.join([*cells, spread_text(ratio, 2)])} |"


def sync_table() -> Iterator[str]:
    """Count what a SyncBatchNorm in Train mode communicates in a step."""
    yield "| model | SyncBatchNorms | channels | collectives, Train | sent by a process, KiB | collectives, Tune |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in SYNCHRONIZED:
        model = torchvision.models.get_model(name, weights=None)
        channels = [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        # Forward: mean, inverse deviation and one count are gathered; backward: two sums per channel are reduced.
        sent = sum((2 * count + 1) + 2 * count for count in channels) * FLOAT_BYTES
        cells = [len(channels), sum(channels), 2 * len(channels), f"{sent / 1024:.0f}", 0]
        yield f"| {name} | {' | '.join(map(str, cells))} |"


def processes_table(measurements: dict[str, Any]) -> Iterator[str]:
    """Draw what wrapping adds in each process."""
    yield "| wrapped by | mode | parameters, MiB | held after the step, MiB | copies of the parameters | collectives |"
    yield "|---|---|---:|---:|---:|---|"
    for row in measurements["rows"]:
        held = row["held_bytes"] / MIB
        calls = ", ".join(f"{count} {name}" for name, count in row["collectives"].items()) or "none"
        cells = [
            f"{row['parameter_bytes'] / MIB:.1f}",
            f"{held:.1f}",
            f"{row['held_bytes'] / row['parameter_bytes']:.2f}",
        ]
        yield f"| {row['wrapped']} | {row['mode']} | {' | '.join(cells)} | {calls} |"
