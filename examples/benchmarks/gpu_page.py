"""The page `docs/benchmarks/gpu.md`: what `gpu.py` has measured; or, as long as it has not run, that it has not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from examples.benchmarks.summary import (
    Row,
    Spread,
    bytes_ratio,
    measured,
    notes,
    ratio_text,
    spread_text,
    time_ratio,
    title,
)
from examples.benchmarks.variants import INDUCTOR_PASS, VARIANTS
from lightning_convbn.memory import MIB


class Published(NamedTuple):
    """Figures that others have published.

    Attributes:
        source: Where, as a link.
        setting: Network, batch and pixels. For the paper, what comes to about its figures.
        gigabytes: Variant -> memory in GB, as it was published.
        reference: The variant that the others are set in relation to.
    """

    source: str
    setting: tuple[str, int, int]
    gigabytes: Mapping[str, float]
    reference: str


PUBLISHED = (
    Published(
        "[PyTorch PR #108757](https://github.com/pytorch/pytorch/pull/108757)",
        ("resnet50", 64, 224),
        {"eval": 5.18, "compiled": 5.46, INDUCTOR_PASS: 2.88},
        "eval",
    ),
    Published(
        "[the paper](https://arxiv.org/abs/2305.11624), CUB-200",
        ("resnet50", 48, 448),
        {"train": 19.967, "tune": 12.323},
        "train",
    ),
)
PEERS = "gpu_peers.json"
COMMAND = "python examples/benchmarks/gpu.py"
INTRODUCTION = """# On a GPU

For users who train on a GPU. The script `examples/benchmarks/gpu.py` needs at most eight minutes on one card:

1. It compares Tune mode, without and with recomputing, with Eval mode in float64: outputs and all gradients.
2. It measures ResNet-50 in the settings of published figures: inductor's pass, and the paper's classification.
3. It measures ResNet-50, EfficientNet-B0, DenseNet-121 and MobileNetV2 at 224 px, with batches of 64 and 1, in float32
   and under bf16 autocast, in both memory formats: Train, Eval and Tune mode and the trainable Deploy copy. In float32
   with a batch of 64 it also measures blocks that run again, and Eval mode with activation checkpointing.
4. It measures Faster R-CNN with ResNet-50 on 4 images of 800 px, in float32 and under bf16 autocast.
5. It captures each step as a CUDA graph, too, and times its replay: what the GPU needs, without what the host needs to
   launch it. A detector looks at values, so it can't be captured."""
NOT_MEASURED = f"""**Not measured on a GPU yet.** Wherever there is a GPU, this command measures and draws this page:

```bash
{COMMAND}
```

Without an installation, `python -m examples.benchmarks.gpu` does the same at the root of the repository. The tests of
the same behaviours run on the CPU in every test run, and on a GPU if there is one:

```bash
python -m pytest tests/gpu
```

Neither needs a network."""
SHORT = """The ratios of the table are to Eval mode in the same setting, for batches above one. *Step*: Python launches
each kernel; *replay*: the same step is replayed as a CUDA graph. Where the ratio of the step is above that of the
replay, the GPU waits for Python: for each pair, Tune mode launches about ten small kernels more than Eval mode.
`torch.compile` and [CUDA graphs](../use/without-a-trainer.md#cuda-graphs) take that time away. On a slower GPU, or on
larger images, the GPU's own work hides it."""
SHOWN = {
    "tune": "Tune",
    "tune_recompute": "elementwise",
    "tune_blocks": "blocks",
    "checkpoint_blocks": "checkpoint per block",
}
LEGEND = """- *Kept* is what the allocator has counted after one forward pass. *Peak* is `max_memory_allocated` of
  forward and backward, gradients included. What was allocated before the step does not count for either.
- *Step* is the median of interleaved rounds, as a ratio to Eval's, with the quartiles of the ratios of single rounds.
- *Replay* is the median of replays of the same step, captured as a CUDA graph. Where it is far below the step, the GPU
  waits for the host. Compiled code is not captured.
- All parameters are trained, without an optimizer. Weights and statistics are random."""


def write(path: Path) -> Path:
    """Draw the page beside a JSON file of `gpu.py`, which need not exist; return its path.

    Steps beside those of compilers come from `gpu_peers.json`, if it is there, too.
    """
    page = path.with_suffix(".md")
    found = [json.loads(file.read_text()) if file.exists() else None for file in (path, path.with_name(PEERS))]
    page.write_text(as_markdown(*found))
    return page


def as_markdown(measurements: Mapping[str, Any] | None, peers: Mapping[str, Any] | None = None) -> str:
    """Draw the page; without measurements it says so."""
    if measurements is None:
        return f"{INTRODUCTION}\n\n{NOT_MEASURED}\n"
    rows: Sequence[Row] = measurements["rows"]
    machine = measurements["machine"]
    known = ", ".join(f"{name} {version}" for name, version in measurements["versions"].items())
    lines = [INTRODUCTION, "", f"Measured on: {machine.get('gpu', machine['cpu'])}; {known}."]
    if measurements["device"] != "cuda":
        lines += ["", "**This was run on a CPU**, to try the script. Nothing here says anything about a GPU."]
        lines += ["Peaks come from the memory events of PyTorch's profiler."]
    if measurements["float32"]:
        how = ", ".join(f"{name}: {setting}" for name, setting in measurements["float32"].items())
        lines += ["", f"How float32 is multiplied, by PyTorch's own setting: {how}."]
    lines += ["", "The command:", "", f"    {measurements['command']}"]
    lines += ["", "## Tune against Eval, in float64", "", *_parity(measurements["parity"])]
    if short := list(_in_short(rows)):
        lines += ["", "## In short", "", SHORT, "", *_ranges(rows), "", *short]
    if any(_row_of(rows, published) for published in PUBLISHED):
        lines += ["", "## Beside published figures", "", *_beside_published(rows)]
    if peers is not None:
        lines += ["", "## With a compiler", "", *_with_compiler(peers)]
    lines += ["", "## All cells", "", LEGEND, "", *_cells(rows)]
    if failed := list(_failures(rows)):
        lines += ["", "## What failed, and what was folded", "", *failed]
    return "\n".join(lines) + "\n"


def _parity(compared: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| network | image | largest relative deviation of the output | of a gradient |"
    yield "|---|---:|---:|---:|"
    for row in compared:
        yield f"| {row['model']} | {row['pixels']} px | {row['output']:.0e} | {row['gradients']:.0e} |"


def _in_short(rows: Sequence[Row]) -> Iterator[str]:
    large = [row for row in rows if row["batch"] > 1 and measured(row, "tune")]
    if large:
        yield "| network | setting | " + " | ".join(f"{name}: peak | step | replay" for name in SHOWN.values()) + " |"
        yield "|---|---|" + "---:|" * (3 * len(SHOWN))
    for row in large:
        cells = [row["model"], title(row)]
        for name in SHOWN:
            peak = bytes_ratio(row, name, "eval", "peak_bytes")
            times = [time_ratio(row, name, "eval", what) for what in ("step_ms", "replay_ms")]
            cells += ["-" if peak is None else f"{peak:.2f}", *(ratio_text(time, 2) or "-" for time in times)]
        yield f"| {' | '.join(cells)} |"


def _ranges(rows: Sequence[Row]) -> Iterator[str]:
    """Say how long steps of the largest batch take, over all its cells."""
    batch = max(row["batch"] for row in rows if measured(row, "tune"))
    largest = [row for row in rows if row["batch"] == batch]
    for what, variant, reference in (("Tune / Eval", "tune", "eval"), ("elementwise / Tune", "tune_recompute", "tune")):
        said = []
        for times, name in (("step_ms", "step"), ("replay_ms", "replay")):
            found = [time_ratio(row, variant, reference, times) for row in largest]
            ratios = sorted(ratio.median for ratio in found if ratio is not None)
            if ratios:
                said.append(f"{name} {ratios[0]:.2f} to {ratios[-1]:.2f} (median {median(ratios):.2f})")
        if said:
            yield f"- {what}, batch {batch}: {', '.join(said)}."


def _beside_published(rows: Sequence[Row]) -> Iterator[str]:
    yield "Published is what the source calls memory, in its GB. Measured are parameters, buffers and the peak, in GB"
    yield "of 10⁹ bytes. How the sources counted is not known here, so compare the ratios. Batch and image size of the"
    yield "paper's rows are assumed: with these, ResNet-50 comes to about its figures."
    yield ""
    yield "| source | setting | variant | published, GB | ratio | measured, GB | ratio | step / Eval |"
    yield "|---|---|---|---:|---:|---:|---:|---|"
    for published in PUBLISHED:
        row = _row_of(rows, published)
        if row is None:
            continue
        model, batch, pixels = published.setting
        reference = _total(row, published.reference)
        for name in row["variants"]:
            total, given = _total(row, name), published.gigabytes.get(name)
            cells = [
                published.source,
                f"{model}, batch {batch}, {pixels} px",
                VARIANTS[name].title,
                "-" if given is None else f"{given:.2f}",
                "-" if given is None else f"{given / published.gigabytes[published.reference]:.2f}",
                "failed" if total is None else f"{total / 1e9:.2f}",
                "-" if total is None or reference is None else f"{total / reference:.2f}",
                _time(row, name),
            ]
            yield f"| {' | '.join(cells)} |"


def _with_compiler(peers: Mapping[str, Any]) -> Iterator[str]:
    yield "Can the whole model be compiled? Then a compiler and Tune mode work together. *Memory budget* is"
    yield "`torch._functorch.config.activation_memory_budget`: the compiler recomputes until that share of the"
    yield f"activations is kept. Measured on: {peers['machine']['gpu']}, by"
    yield ""
    yield from (f"    {command}" for command in peers["commands"])
    yield ""
    yield "| network | setting | variant | peak, MiB | / Eval | step, ms | / Eval |"
    yield "|---|---|---|---:|---:|---:|---|"
    for row in peers["rows"]:
        for name in row["variants"]:
            cells = [row["model"], title(row), VARIANTS[name].title, *_bytes_and_step(row, name, "peak_bytes")]
            yield f"| {' | '.join(cells)} |"
    yield ""
    yield from _failures(peers["rows"])


def _row_of(rows: Sequence[Row], published: Published) -> Row | None:
    """The row of plain float32 in the setting of published figures."""
    for row in rows:
        plain = row["precision"] == "fp32" and not row["channels_last"]
        if plain and (row["model"], row["batch"], row["pixels"]) == published.setting:
            return row
    return None


def _total(row: Row, variant: str) -> int | None:
    """Parameters, buffers, and the peak."""
    found = measured(row, variant)
    return None if found is None else found["resident_bytes"] + found["peak_bytes"]


def _cells(rows: Sequence[Row]) -> Iterator[str]:
    ratios = " | / Eval | ".join(("kept, MiB", "peak, MiB", "step, ms", "replay, ms"))
    yield f"| network | setting | variant | {ratios} | / Eval |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|"
    for row in rows:
        for name in row["variants"]:
            cells = [row["model"], title(row), VARIANTS[name].title]
            cells += _bytes_and_step(row, name, "kept_bytes", "peak_bytes")
            found = measured(row, name)
            replayed = f"{Spread.of(found['replay_ms']).median:.1f}" if found and "replay_ms" in found else "-"
            cells += [replayed, ratio_text(time_ratio(row, name, "eval", "replay_ms"), 2) or "-"]
            yield f"| {' | '.join(cells)} |"


def _bytes_and_step(row: Row, variant: str, *sizes: str) -> list[str]:
    """The cells of one variant: each of these sizes in MiB, and its step in ms, all with their ratios to Eval's."""
    found = measured(row, variant)
    if found is None:
        return ["failed", *["-"] * (2 * len(sizes) + 1)]
    cells = []
    for what in sizes:
        ratio = bytes_ratio(row, variant, "eval", what)
        cells += [f"{found[what] / MIB:.1f}", "-" if ratio is None else f"{ratio:.2f}"]
    return [*cells, f"{Spread.of(found['step_ms']).median:.1f}", _time(row, variant)]


def _time(row: Row, variant: str) -> str:
    ratio = time_ratio(row, variant, "eval")
    return "-" if ratio is None else spread_text(ratio, 2)


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        for note in ([row["failed"]] if "failed" in row else []) + notes(row):
            yield f"- {row['model']}, {title(row)}: {note}"
