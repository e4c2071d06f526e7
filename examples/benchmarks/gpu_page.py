"""The tables of `docs/benchmarks/gpu.md`, from what `gpu.py` has measured. Every cell is in `gpu.json`.

python examples/benchmarks/gpu_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
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
from examples.results_file import BENCHMARKS, fill, markdown_table
from lightning_convbn.memory import MIB

PAGE = BENCHMARKS / "gpu.md"
RESULTS = BENCHMARKS / "gpu.json"
PEERS = BENCHMARKS / "gpu_peers.json"


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
SHOWN = ("tune", "tune_recompute", "tune_blocks", "checkpoint_blocks")


def write() -> Path:
    """Fill in the page; return its path."""
    measurements, peers = (json.loads(path.read_text()) for path in (RESULTS, PEERS))
    return fill(PAGE, tables(measurements, peers))


def tables(measurements: Mapping[str, Any], peers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Draw the tables of the page, by their marks.

    Args:
        measurements: What `gpu.py` has measured.
        peers: What `all_modes.py` has measured beside compilers.
    """
    rows: Sequence[Row] = measurements["rows"]
    machine = measurements["machine"]
    known = ", ".join(f"{name} {version}" for name, version in measurements["versions"].items())
    how = ", ".join(f"{name}: {setting}" for name, setting in measurements["float32"].items())
    return {
        "facts": [
            f"Measured on: {machine.get('gpu', machine['cpu'])}; {known}, by `{measurements['command']}`.",
            f"How float32 is multiplied, by PyTorch's own setting: {how or '-'}.",
        ],
        "parity": _parity(measurements["parity"]),
        "ranges": [*_ranges(rows)],
        "settings": _by_setting(rows),
        "published": _beside_published(rows),
        "compiler": [*_with_compiler(peers)],
        "failures": [*_failures(rows)],
    }


def _parity(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        [row["model"], f"{row['pixels']} px", f"{row['output']:.0e}", f"{row['gradients']:.0e}"] for row in compared
    ]
    return markdown_table(["network", "image", "largest relative deviation of the output", "of a gradient"], cells)


def _by_setting(rows: Sequence[Row]) -> list[str]:
    """Draw what each variant takes of Eval's peak, step and replay, for batches above one."""
    lines = []
    for row in rows:
        if row["batch"] > 1 and measured(row, "tune"):
            lines.append(
                [row["model"], title(row).replace(f", {row['device']}", ""), *(_cell(row, one) for one in SHOWN)]
            )
    return markdown_table(["network", "setting", *(VARIANTS[name].title for name in SHOWN)], lines, words=(0, 1))


def _cell(row: Row, variant: str) -> str:
    peak = bytes_ratio(row, variant, "eval", "peak_bytes")
    times = [time_ratio(row, variant, "eval", what) for what in ("step_ms", "replay_ms")]
    return "-" if peak is None else ", ".join([f"{peak:.2f}", *(ratio_text(time, 2) or "-" for time in times)])


def _ranges(rows: Sequence[Row]) -> Iterator[str]:
    """Say what each variant takes of Eval mode at the largest and at the smallest batch, over all their settings."""
    batches = {row["batch"] for row in rows if measured(row, "tune")}
    for batch, variant in product((max(batches), min(batches)), SHOWN):
        chosen = [row for row in rows if row["batch"] == batch and measured(row, variant)]
        peaks = [bytes_ratio(row, variant, "eval", "peak_bytes") for row in chosen]
        steps, replays = (
            [time_ratio(row, variant, "eval", what) for row in chosen] for what in ("step_ms", "replay_ms")
        )
        found = {"peak": peaks, "step": [*map(_median, steps)], "replay": [*map(_median, replays)]}
        said = [f"{what} {_range(known)}" for what, all in found.items() if (known := [one for one in all if one])]
        if said:
            yield f"- {VARIANTS[variant].title}, batch {batch}: {', '.join(said)}."


def _median(ratio: Spread | None) -> float | None:
    return None if ratio is None else ratio.median


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f} (median {median(ratios):.2f})"


def _beside_published(rows: Sequence[Row]) -> list[str]:
    """Draw the variants of which others have published figures, and Tune mode."""
    lines = []
    for published in PUBLISHED:
        row = _row_of(rows, published)
        if row is None:
            continue
        model, batch, pixels = published.setting
        setting = f"{published.source}: {model}, batch {batch}, {pixels} px"
        reference = _total(row, published.reference)
        for name in row["variants"]:
            total, given = _total(row, name), published.gigabytes.get(name)
            if given is None and name not in ("tune", "tune_recompute"):
                continue
            theirs = ["-", "-"] if given is None else _with_ratio(given, published.gigabytes[published.reference])
            ours = ["failed", "-"] if total is None or reference is None else _with_ratio(total / 1e9, reference / 1e9)
            lines.append([setting, VARIANTS[name].title, *theirs, *ours])
    return markdown_table(["source", "variant", "published, GB", "ratio", "measured, GB", "ratio"], lines, words=(0, 1))


def _with_ratio(gigabytes: float, reference: float) -> list[str]:
    return [f"{gigabytes:.2f}", f"{gigabytes / reference:.2f}"]


def _with_compiler(peers: Mapping[str, Any]) -> Iterator[str]:
    header = ["variant", "peak, MiB", "/ Eval", "step, ms", "/ Eval"]
    for row in peers["rows"]:
        yield from (f"{row['model']}, {title(row)}:", "")
        lines = [[VARIANTS[name].title, *_peak_and_step(row, name)] for name in row["variants"]]
        yield from (*markdown_table(header, lines, words=(0, 4)), "")
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


def _peak_and_step(row: Row, variant: str) -> list[str]:
    """The cells of one variant: its peak and its step, with their ratios to Eval's."""
    found = measured(row, variant)
    if found is None:
        return ["failed", "-", "-", "-"]
    ratio = bytes_ratio(row, variant, "eval", "peak_bytes")
    peak = [f"{found['peak_bytes'] / MIB:.1f}", "-" if ratio is None else f"{ratio:.2f}"]
    return [*peak, f"{Spread.of(found['step_ms']).median:.1f}", _time(row, variant)]


def _time(row: Row, variant: str) -> str:
    ratio = time_ratio(row, variant, "eval")
    return "-" if ratio is None else spread_text(ratio, 2)


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        for note in ([row["failed"]] if "failed" in row else []) + notes(row):
            yield f"- {row['model']}, {title(row)}: {note}"


if __name__ == "__main__":
    print(f"wrote {write()}")
