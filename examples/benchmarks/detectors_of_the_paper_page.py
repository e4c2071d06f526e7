"""The tables of `docs/benchmarks/detectors-of-the-paper.md`, from what `detectors_of_the_paper.py` has counted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from examples.results_file import BENCHMARKS, markdown_table

PAGE = BENCHMARKS / "detectors-of-the-paper.md"
TITLES = {
    "eval": "Eval",
    "tune_as_published": "Tune as published",
    "tune": "Tune",
    "tune_elementwise": "Tune + elementwise",
    "tune_blocks": "Tune + blocks",
}
TOLERANCE_PERCENT = 1  # how far a counted step may be from a real one in the tests; the page says it, too
LEVELS = ("tune", "tune_elementwise", "tune_blocks")


def tables(report: dict[str, Any]) -> dict[str, list[str]]:
    """Draw the tables of the page, by their marks.

    Args:
        report: What is in the JSON file.
    """
    rows = report["rows"]
    return {"paper": beside_the_paper(rows), "in-all": levels(rows, in_all), "kept": levels(rows, kept)}


def in_all(row: dict[str, Any], variant: str) -> float:
    """Return the GiB of parameters, buffers, and the peak."""
    return float(row["fixed_mib"] + row["counted"][variant]["peak_mib"]) / 1024


def kept(row: dict[str, Any], variant: str) -> float:
    """Return the GiB that are kept for the backward pass."""
    return float(row["counted"][variant]["kept_mib"]) / 1024


def less(row: dict[str, Any]) -> tuple[float, float]:
    """Return how much less Tune as published needs in all than Eval: in the paper, and as counted."""
    return row["eval"] - row["tune"], in_all(row, "eval") - in_all(row, "tune_as_published")


def beside_the_paper(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Draw the table that has the paper's figures beside the counted ones."""
    lines = []
    for row in rows:
        plain, published, tune = (in_all(row, name) for name in ("eval", "tune_as_published", "tune"))
        paper, counted = less(row)
        cells = [name(row), f"{row['eval']:.3f} → {row['tune']:.3f}", percent(row["eval"], row["tune"]), f"{paper:.3f}"]
        cells += [f"{plain:.3f} → {published:.3f}", percent(plain, published), f"{counted:.3f}"]
        lines.append([*cells, f"{tune:.3f}", percent(plain, tune)])
    header = ["paper: Eval → Tune", "", "less", "counted: Eval → Tune as published", "", "less", "Tune, here", ""]
    return markdown_table(["detector", *header], lines)


def levels(rows: Sequence[dict[str, Any]], size: Any) -> list[str]:
    """Draw the table of one size in Eval mode and in each level of Tune mode, with percents of Eval's."""
    lines = []
    for row in rows:
        plain = size(row, "eval")
        cells = [(f"{size(row, level):.2f}", percent(plain, size(row, level))) for level in LEVELS]
        lines.append([name(row), f"{plain:.2f}", *itertools.chain(*cells)])
    return markdown_table(["detector", "Eval", *itertools.chain(*((TITLES[level], "") for level in LEVELS))], lines)


def name(row: dict[str, Any]) -> str:
    """Name a row by its detector, backbone, batch and precision."""
    return f"{row['detector']}, {row['backbone']}, {row['batch']} × {row['precision']}"


def percent(before: float, after: float) -> str:
    """Write a change, with a minus sign if it is less."""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")
