"""Summaries of what `all_modes.py` has measured: ratios with their spread, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

from examples.benchmarks.variants import VARIANTS
from examples.results_file import as_table
from lightning_convbn.memory import MIB

Row = Mapping[str, Any]
SETTING = ("model", "batch", "pixels", "device", "precision", "channels_last")


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values. For a single value, the quartiles are that value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, _, upper = quantiles(values, n=4, method="inclusive")
        return cls(median(values), lower, upper)


def measured(row: Row, variant: str) -> Mapping[str, Any] | None:
    """Return the measurements of a variant; None if it was not run or failed."""
    found: Mapping[str, Any] | None = row["variants"].get(variant)
    return None if found is None or "failed" in found else found


def bytes_ratio(row: Row, variant: str, other: str, what: str = "kept_bytes") -> float | None:
    """Return the ratio of two variants' bytes."""
    own, reference = measured(row, variant), measured(row, other)
    return None if own is None or reference is None else own[what] / reference[what]


def time_ratio(row: Row, variant: str, other: str, what: str = "step_ms") -> Spread | None:
    """Return the ratio of two variants' median step times, and the quartiles of the ratios of single rounds."""
    own, reference = measured(row, variant), measured(row, other)
    if own is None or reference is None or what not in own or what not in reference:
        return None
    ratios = Spread.of([one / two for one, two in zip(own[what], reference[what], strict=True)])
    return ratios._replace(median=median(own[what]) / median(reference[what]))


def title(row: Row) -> str:
    """Return the setting of a row as text."""
    precision = "" if row["precision"] == "fp32" else f", {row['precision']} autocast"
    layout = ", channels_last" if row["channels_last"] else ""
    return f"batch {row['batch']}, {row['pixels']} px, {row['device']}{precision}{layout}"


def cell_table(row: Row) -> list[str]:
    """Draw the measurements of one network in one setting as a table for a console."""
    return [*as_table([*_cells(row)]).splitlines(), *notes(row)]


def _cells(row: Row) -> Iterator[dict[str, str]]:
    for name in row["variants"]:
        found = measured(row, name)
        off = found and found["gradient_deviation"]
        yield {
            "variant": VARIANTS[name].title,
            "kept, MiB": "failed" if found is None else f"{found['kept_bytes'] / MIB:.1f}",
            "/ Deploy": ratio_text(bytes_ratio(row, name, "deploy"), 3),
            "peak, MiB": "" if found is None else f"{found['peak_bytes'] / MIB:.1f}",
            "step, ms (quartiles)": "" if found is None else spread_text(Spread.of(found["step_ms"]), 1),
            "step / Eval": ratio_text(time_ratio(row, name, "eval"), 2),
            "step / Deploy": ratio_text(time_ratio(row, name, "deploy"), 2),
            "gradient deviation": "" if off is None else f"{off:.1e}",
        }


def notes(row: Row) -> list[str]:
    """Return a line for each variant that failed, and for each note."""
    found = [(VARIANTS[name].title, one) for name, one in row["variants"].items()]
    failed = [f"{name} failed: {one['failed']}" for name, one in found if "failed" in one]
    return failed + [f"{name}: {one['note']}" for name, one in found if "note" in one]


def ratio_text(ratio: float | Spread | None, digits: int) -> str:
    """Write a ratio, or nothing."""
    value = ratio.median if isinstance(ratio, Spread) else ratio
    return "" if value is None else f"{value:.{digits}f}"


def spread_text(spread: Spread, digits: int) -> str:
    """Write a median with its quartiles."""
    return f"{spread.median:.{digits}f} ({spread.lower:.{digits}f} to {spread.upper:.{digits}f})"
