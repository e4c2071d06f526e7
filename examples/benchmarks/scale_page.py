"""The page `docs/benchmarks/scaling.md`: how memory and time grow with batch, resolution, depth and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torchvision
from torch import nn

from examples.benchmarks.summary import SETTING, Row, Spread, measured, spread_text, time_ratio
from examples.benchmarks.variants import VARIANTS
from examples.results_file import BENCHMARKS
from lightning_convbn.memory import MIB

PROSE = """# Scaling

For users who want to know how memory and time grow with batch, resolution, depth and number of processes. The tables
show what one forward pass keeps for the backward pass, and how long a step takes (forward and backward, no
optimizer). They are drawn by `python examples/benchmarks/write_pages.py` from `docs/benchmarks/scale.json` and
`docs/benchmarks/processes.json`. [Another page](modes.md) compares other tools and more networks. Not measured on a
GPU yet.

{setting}

![Kept bytes and step time along batch, resolution and depth](scale.png)

## Batch

In all modes, kept bytes grow in proportion to the batch. So Tune's share of Eval's stays the same. Folding takes time
once per step, for every batch size. With few images this time matters most, and a step of Tune is longer than one of
Eval.

{batch}

## Resolution

Kept bytes and step time grow with the area of the image. Folding takes the same time for every image size, because it
only works on weights. So it matters less for larger images.

{pixels}

## Depth

In Tune mode each convolution with its BatchNorm keeps its input, in Eval mode its input and its output. A deeper
network has more of both.

{model}

## Processes

In every mode, each process keeps what a single one would keep for its share of the batch. What a wrapper adds hardly
depends on the mode, because Tune mode does not change the parameters.

The table shows what one of the processes has allocated after a first step and not freed:

- The gradients.
- With DDP its buckets, which are another copy of the gradients. With `gradient_as_bucket_view=True` the gradients are
  views of the buckets.
- With FSDP each process holds a share of the parameters and gradients. The rows count the shards that FSDP made. They
  do not subtract the original parameters that it freed, because these are older than the count.

An optimizer's state comes on top, whole with DDP and sharded with FSDP. The last column counts calls in the second
step.

{processes}

## SyncBatchNorm

In Train mode a SyncBatchNorm communicates twice per step. In the forward pass it gathers two numbers for each channel
and a count from each process. In the backward pass it sums two numbers for each channel. Frozen statistics need
neither: in Eval and in Tune mode no SyncBatchNorm communicates.

SyncBatchNorm needs a GPU. So this is counted from the layers of the networks, not measured: two calls per layer and
step, float32.

{sync}
"""
PAGE = BENCHMARKS / "scaling.md"
AXES = {"images in a batch": "batch", "pixels": "pixels", "network": "model"}
SHOWN = ("eval", "tune", "deploy")
SYNCHRONIZED = ("resnet18", "resnet50", "resnet101")
FLOAT_BYTES = 4


def along(rows: Sequence[Row], key: str) -> list[Row]:
    """Return the rows that differ from the most common setting in ``key`` alone."""
    middle = {one: Counter(row[one] for row in rows).most_common(1)[0][0] for one in SETTING}
    chosen = [row for row in rows if all(row[one] == middle[one] for one in SETTING if one != key)]
    if key != "model":
        return sorted(chosen, key=lambda row: row[key])
    return sorted(chosen, key=lambda row: row["variants"]["eval"]["resident_bytes"])


def as_markdown(rows: Sequence[Row], processes: Mapping[str, Any]) -> str:
    """Draw the page from the results of `all_modes.py` and of `processes.py`."""
    tables = {key: growth_table(rows, key) for key in AXES.values()}
    tables |= {"setting": setting(rows), "sync": sync_table(), "processes": processes_table(processes)}
    return PROSE.format(**{name: "\n".join(lines) for name, lines in tables.items()})


def setting(rows: Sequence[Row]) -> Iterator[str]:
    """Return the setting that the tables share."""
    middle = along(rows, "batch")[0]
    rounds = f"{middle['rounds']} interleaved rounds"
    batch = Counter(row["batch"] for row in rows).most_common(1)[0][0]
    yield f"If nothing else is said: {middle['model']}, batch {batch}, {middle['pixels']} px,"
    yield f"{middle['precision']}, {middle['device']}, {rounds}."


def growth_table(rows: Sequence[Row], key: str) -> Iterator[str]:
    """Draw kept bytes and step times along one axis."""
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
    """Count what SyncBatchNorms communicate in one step in Train mode."""
    yield "| model | SyncBatchNorms | channels | collectives, Train | sent by a process, KiB | collectives, Tune |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in SYNCHRONIZED:
        model = torchvision.models.get_model(name, weights=None)
        channels = [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        # Forward: mean, inverse deviation and one count are gathered; backward: two sums per channel are reduced.
        sent = sum((2 * count + 1) + 2 * count for count in channels) * FLOAT_BYTES
        cells = [len(channels), sum(channels), 2 * len(channels), f"{sent / 1024:.0f}", 0]
        yield f"| {name} | {' | '.join(map(str, cells))} |"


def processes_table(measurements: Mapping[str, Any]) -> Iterator[str]:
    """Draw what each wrapper adds in a process."""
    where = "{model}, batch {batch} and {pixels} px in each of {processes} processes, {backend}.".format(**measurements)
    yield where[0].upper() + where[1:]
    yield ""
    titles = ["mode", "parameters, MiB", "allocated, MiB", "in copies of the parameters", "collectives"]
    yield f"| wrapped by | {' | '.join(titles)} |"
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
