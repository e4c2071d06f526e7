"""The page `docs/benchmarks/modes.md`: what `all_modes.py` has measured, with the cases that Tune mode loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

from examples.benchmarks import trade_off
from examples.benchmarks.networks import DETECTOR
from examples.benchmarks.summary import (
    Row,
    Spread,
    bytes_ratio,
    measured,
    notes,
    spread_text,
    time_ratio,
    title,
)
from examples.benchmarks.variants import VARIANTS
from examples.results_file import moved_scripts
from lightning_convbn.memory import MIB

LEAST_NETWORKS = 9  # of a setting, for its picture of peak against step time
RECOMPUTE_LIMITS = {"efficientnet_b0": 0.62, "efficientnet_v2_s": 0.63, "mobilenet_v3_large": 0.80}


class Target(NamedTuple):
    """A ratio of two variants, and the largest value that is good.

    Attributes:
        ours: Variants; the best of them counts.
        theirs: Variants to compare with; the best of them counts.
        limit: The largest good ratio for a model.
        what: ``"kept_bytes"``, ``"peak_bytes"`` or ``"step_ms"``.
    """

    ours: Sequence[str]
    theirs: Sequence[str]
    limit: Callable[[str], float | None]
    what: str = "kept_bytes"

    @property
    def title(self) -> str:
        """Its name in a table."""
        best = (" or ".join(VARIANTS[name].title for name in names) for names in (self.ours, self.theirs))
        return " / ".join(best)

    def ratio(self, row: Row) -> Spread | None:
        """Return the ratio of the best of both sides. A ratio of bytes has no spread."""
        ours, theirs = (
            min((name for name in names if measured(row, name)), key=lambda name: self._amount(row, name), default=None)
            for names in (self.ours, self.theirs)
        )
        if ours is None or theirs is None:
            return None
        if self.what == "step_ms":
            return time_ratio(row, ours, theirs)
        ratio = bytes_ratio(row, ours, theirs, self.what)
        return None if ratio is None else Spread(ratio, ratio, ratio)

    def text(self, row: Row) -> str:
        """Return the ratio as text. A ratio above the target is bold."""
        ratio, limit = self.ratio(row), self.limit(row["model"])
        if ratio is None:
            return "-"
        digits = 2 if self.what == "step_ms" else 3
        value = spread_text(ratio, digits) if self.what == "step_ms" else f"{ratio.median:.{digits}f}"
        if limit is None or round(ratio.median, digits) <= limit:
            return value
        if round(ratio.lower, digits) <= limit:
            return f"{value}, target {limit:.2f} within the quartiles"
        return f"**{value}, above {limit:.2f}**"

    def _amount(self, row: Row, name: str) -> float:
        found = measured(row, name)
        assert found is not None
        return median(found["step_ms"]) if self.what == "step_ms" else found[self.what]


def _always(limit: float) -> Callable[[str], float | None]:
    return lambda model: limit


KEPT = [
    Target(["tune"], ["deploy"], _always(1.01)),
    Target(["tune"], ["eval"], _always(1.0)),
    Target(["tune"], ["mmengine"], _always(1.0)),
    Target(["tune_recompute"], ["tune"], _always(1.0)),
    Target(["tune_recompute"], ["deploy"], RECOMPUTE_LIMITS.get),
    Target(["tune_compiled"], ["inductor_pass"], _always(1.0)),
    Target(["tune_recompute", "tune_compiled"], ["inductor_pass", "compiled", "mmengine"], _always(1.0)),
]
PEAK = [
    Target(["tune"], ["eval"], _always(1.0), "peak_bytes"),
    Target(["tune_recompute"], ["checkpoint"], _always(1.0), "peak_bytes"),
    Target(["tune_blocks"], ["checkpoint"], _always(1.0), "peak_bytes"),
    Target(["tune_blocks"], ["checkpoint_blocks"], _always(1.0), "peak_bytes"),
]
TIME = [
    Target(["tune"], ["deploy"], lambda model: 1.05 if model == "resnet50" else 1.08, "step_ms"),
    Target(["tune"], ["eval"], _always(1.0), "step_ms"),
    Target(["tune"], ["mmengine"], _always(1.0), "step_ms"),
    Target(["tune_recompute"], ["tune"], lambda model: 1.25 if model == "densenet121" else 1.05, "step_ms"),
    Target(["tune_recompute"], ["checkpoint"], _always(1.0), "step_ms"),
    Target(["tune_blocks"], ["checkpoint_blocks"], _always(1.0), "step_ms"),
    Target(["tune_compiled"], ["inductor_pass"], _always(1.0), "step_ms"),
]
TRAIN = [
    Target(["train_recompute"], ["train"], _always(1.0)),
    Target(["train_recompute"], ["train"], _always(1.0), "peak_bytes"),
    Target(["train_blocks"], ["train_checkpoint_blocks"], _always(1.0), "peak_bytes"),
    Target(["train_recompute"], ["train"], _always(1.25), "step_ms"),
    Target(["train_blocks"], ["train_checkpoint_blocks"], _always(1.0), "step_ms"),
]
UNITS = {"kept_bytes": "kept", "peak_bytes": "peak", "step_ms": "step"}
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Kept for backward, MiB": lambda found: f"{found['kept_bytes'] / MIB:.1f}",
    "Peak of forward and backward, gradients included, MiB": lambda found: f"{found['peak_bytes'] / MIB:.1f}",
    "Step time, ms, and quartiles": lambda found: spread_text(Spread.of(found["step_ms"]), 0),
    "Largest relative deviation of a parameter's gradient from Eval's": lambda found: (
        "-" if found["gradient_deviation"] is None else f"{found['gradient_deviation']:.0e}"
    ),
}
INTRODUCTION = """# All modes, and other tools

For users who want to compare every mode with other tools, also where Tune mode loses. Each network makes a training
step in every mode and with every tool, all in one process: forward, mean of the outputs, backward. All parameters are
trained, without an optimizer. Weights and statistics are random. Except in Train mode, BatchNorms use their running
statistics. [Train from scratch with less memory](../use/train-from-scratch.md) has more about Train mode.

- *Kept* is what the allocator has counted after one forward pass. It includes the batch if it is kept. *Peak* is the
  most at one moment of the forward and the backward pass, gradients included. What was there before the step does not
  count.
- *Step time* is the median of interleaved rounds; each round has its own order. A ratio is shown with the quartiles
  of the ratios of single rounds.
- *Deploy copy* is the trainable copy that `fuse_for_deploy` makes. It is the lower limit for every method that keeps
  the inputs of the convolutions, but it does not train the parameters of the original.
- *mmengine* is its `turn_on_efficient_conv_bn_eval`. *inductor's pass* is `efficient_conv_bn_eval_fx_passes` under
  `torch.compile`. *checkpoint per stage* is `torch.utils.checkpoint` around each stage in Eval mode, which runs the
  forward pass of each stage twice.
- *Tune, budget 0.70 of Eval* is `fit_memory_budget`: the least recomputation whose peak is at most that share of
  Eval's, beyond parameters and buffers. It failed where no recomputation fits; the last section says how much would.
- *checkpoint per block* is the same checkpoint around each block that `recompute="blocks"` finds. In Train mode it
  updates the running statistics twice in a step.
- A ratio above its target is **bold**."""

OF_THE_DETECTOR = """Compilers and tracers get only the backbone of the detector. The detector samples its proposals
by score. So rounding changes some of them, and with them the gradients."""
ALLOCATOR = """The variables make glibc's allocator keep memory that is freed. Without them it returns large blocks
to the kernel and gets them back page by page. It does so in some steps more often than in others. The variant that
keeps most loses most time by it."""


def as_markdown(measurements: Mapping[str, Any], stem: str) -> str:
    """Draw the page. The names of the pictures begin with ``stem``."""
    rows, machine = measurements["rows"], measurements["machine"]
    known = ", ".join(f"{name} {version}" for name, version in measurements["versions"].items())
    allocator = "".join(f", {name}={value}" for name, value in machine["allocator"].items())
    commands = "\n".join(f"    {command}" for command in measurements["commands"])
    lines = [
        INTRODUCTION,
        "",
        f"{machine.get('gpu', machine['cpu'])}, threads: {machine['threads']}{allocator}; {known}.",
    ]
    lines += ["Written by `python examples/benchmarks/write_pages.py` from what these commands measured:", "", commands]
    if moved := moved_scripts(measurements["commands"]):
        lines += ["", *moved]
    if machine["allocator"]:
        lines += ["", ALLOCATOR]
    if any(row["model"] == DETECTOR for row in rows):
        lines += ["", OF_THE_DETECTOR]
    if all(row["device"] == "cpu" for row in rows):
        lines += ["", "On a GPU: see [the page of its measurements](gpu.md); `--device cuda` runs the same code."]
    drawn = pictures(rows, stem)
    for name, chosen in drawn.items():
        lines += ["", *_section(chosen, name)]
    said = [f"- {row['model']}, {title(row)}: {note}" for row in rows for note in notes(row)]
    if said:
        lines += ["", "## What failed, and what was folded", "", *said]
    return "\n".join(lines) + "\n"


def pictures(rows: Sequence[Row], stem: str) -> dict[str, list[Row]]:
    """Group the rows by all settings but the network, by the name of a picture for each group."""
    ordered = sorted(rows, key=lambda row: (row["pixels"], row["batch"], title(row)))  # stable: models as measured
    return {
        f"{stem}-{name.replace(', ', '-').replace(' ', '')}.png": list(chosen)
        for name, chosen in groupby(ordered, title)
    }


def trade_off_picture(picture: str) -> str:
    """Return the name of the picture of peak against step time, from that of the other one."""
    return picture.replace(".png", "-trade-off.png")


def _section(rows: Sequence[Row], picture: str) -> Iterator[str]:
    name = title(rows[0])
    yield from (f"## {name[0].upper()}{name[1:]}", "", f"![Kept, peak and step time]({picture})")
    compared = {
        "Kept against the targets": KEPT,
        "Peak against the targets": PEAK,
        "Step time against the targets": TIME,
    }
    for heading, targets in compared.items():
        table = [[target.text(row) for target in targets] for row in rows]
        yield from ("", f"### {heading}", "", *_table([target.title for target in targets], rows, table))
    if any(target.ratio(row) for target in TRAIN for row in rows):
        table = [[target.text(row) for target in TRAIN] for row in rows]
        titles = [f"{UNITS[target.what]}: {target.title}" for target in TRAIN]
        yield from ("", "### Train mode against the targets", "", *_table(titles, rows, table))
    if len(rows) >= LEAST_NETWORKS:
        yield from ("", *trade_off.section(rows, trade_off_picture(picture)))
    variants = _variants(rows)
    for heading, text in TABLES.items():
        cells = [[_cell(row, variant, text) for variant in variants] for row in rows]
        yield from ("", f"### {heading}", "", *_table([VARIANTS[one].title for one in variants], rows, cells))


def _variants(rows: Sequence[Row]) -> list[str]:
    return [name for name in VARIANTS if any(name in row["variants"] for row in rows)]


def _cell(row: Row, variant: str, text: Callable[[Mapping[str, Any]], str]) -> str:
    if variant not in row["variants"]:
        return "-"
    found = measured(row, variant)
    return "failed" if found is None else text(found)


def _table(titles: Sequence[str], rows: Sequence[Row], cells: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| model | {' | '.join(titles)} |"
    yield "|---|" + "---:|" * len(titles)
    for row, line in zip(rows, cells, strict=True):
        yield f"| {row['model']} | {' | '.join(line)} |"
