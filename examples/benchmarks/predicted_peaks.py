"""Predict the peaks of training steps without running them, and set them beside what the allocator counts.

    python examples/benchmarks/predicted_peaks.py

runs a step of each network on the CPU, in float32 with 8 images of 224 px, and asks the allocator for its peak: with
and without the workspaces of kernels, which no prediction knows. For a GPU it takes the float32 steps of a batch that
`gpu.json` holds. A detector looks at values, so it can't be predicted without running it. The results go to
`docs/benchmarks/predicted_peaks.json`, and as a table to `docs/use/memory-budget.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples import results_file
from examples.benchmarks.allocator import peak_by_allocator
from examples.benchmarks.networks import DETECTOR, MODELS, Workload, workload
from examples.benchmarks.summary import SETTING, Row, measured
from examples.benchmarks.training_step import Step
from examples.benchmarks.variants import VARIANTS
from lightning_convbn import Mode, Recompute
from lightning_convbn.memory import measure_memory_abstractly

RESULTS = results_file.BENCHMARKS / "predicted_peaks.json"
ON_GPU = results_file.BENCHMARKS / "gpu.json"
PAGE = results_file.ROOT / "docs" / "use" / "memory-budget.md"
MARK = "predicted-peaks"
PREDICTED: dict[str, tuple[Mode, Recompute]] = {
    "eval": ("eval", "none"),
    "tune": ("tune", "none"),
    "tune_recompute": ("tune", "elementwise"),
    "tune_blocks": ("tune", "blocks"),
}
CELL = SETTING[:4]  # all are in float32, and contiguous
CPU = torch.device("cpu")


def main() -> None:
    """Predict, measure, print, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[name for name in MODELS if name != DETECTOR])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--gpu", type=Path, default=ON_GPU, help="what gpu.py has measured, if it exists")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += on_cpu(name, arguments.batch, arguments.pixels)
    facts: dict[str, Any] = {"machine": results_file.machine(CPU)}
    if arguments.gpu.exists():
        on_card = json.loads(arguments.gpu.read_text())
        facts["gpu"] = {what: on_card[what] for what in ("machine", "versions")}
        for row in on_card["rows"]:
            rows += on_gpu(row) if row["model"] in arguments.models else ()
    print(*(lines := table(rows)), sep="\n")
    print(results_file.write_json(arguments.out, rows, ("torch", "torchvision"), **facts))
    if arguments.out == RESULTS:
        results_file.fill(PAGE, {MARK: lines})


def on_cpu(name: str, batch: int, pixels: int) -> Iterator[dict[str, Any]]:
    """Predict and measure the steps of a network on the CPU, by variant."""
    work = workload(name, batch, pixels, CPU, channels_last=False)
    setting = dict(zip(CELL, (name, batch, pixels, CPU.type), strict=True))
    for variant in PREDICTED:
        step = Step(work, VARIANTS[variant].build(work), CPU, "fp32")
        step()  # autograd and oneDNN allocate once what stays
        fresh = partial(step, fresh_inputs=True)
        peaks = {
            "predicted": predicted_peak(work, variant),
            "measured": peak_by_allocator(fresh),
            "without_workspaces": peak_by_allocator(fresh, count_workspaces=False),
        }
        yield {**setting, "variant": variant, **peaks}


def on_gpu(row: Row) -> Iterator[dict[str, Any]]:
    """Predict the steps that were measured in a cell on a GPU, by variant: those in float32 of a batch."""
    if row["precision"] != "fp32" or row["channels_last"] or row["batch"] == 1 or row["model"] == DETECTOR:
        return
    work = workload(row["model"], row["batch"], row["pixels"], CPU, channels_last=False)
    setting = {key: row[key] for key in CELL}
    for variant in PREDICTED:
        if (found := measured(row, variant)) is not None:
            peaks = {"predicted": predicted_peak(work, variant), "measured": found["peak_bytes"]}
            yield {**setting, "variant": variant, **peaks}


def predicted_peak(work: Workload, variant: str) -> int:
    """Predict the peak of a step of a variant, in bytes beyond parameters and buffers. Nothing is computed."""
    mode, recompute = PREDICTED[variant]
    asked: dict[str, Any] = {"mode": mode, "recompute": recompute, "pairs": work.pairs}
    peak = measure_memory_abstractly(work.model, work.inputs, {}, allow_real_run=False, **asked).peak_bytes
    assert peak is not None
    return peak


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Draw a table: a row for each cell, and in each column by how many percent the prediction was off."""
    lines = []
    for setting in dict.fromkeys(tuple(row[key] for key in CELL) for row in rows):
        own = {row["variant"]: row for row in rows if tuple(row[key] for key in CELL) == setting}
        model, batch, pixels, device = setting
        cells = [_cell(own[name]) if name in own else "-" for name in PREDICTED]
        lines.append([model, f"{batch} × {pixels} px, {device.upper()}", *cells])
    return results_file.markdown_table(
        ["network", "step", *(VARIANTS[name].title for name in PREDICTED)], lines, words=(0, 1)
    )


def _cell(row: dict[str, Any]) -> str:
    offs = [_off(row["predicted"], row[what]) for what in ("measured", "without_workspaces") if what in row]
    return " ".join([offs[0], *(f"({off})" for off in offs[1:]), "%"])


def _off(predicted: int, counted: int) -> str:
    percent = round(100 * (predicted / counted - 1), 1)
    return f"{percent:+.1f}" if percent else "0.0"


if __name__ == "__main__":
    main()
