"""Draws the picture of ``measure --plot``: what each section of the model keeps, and peak against step time."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_convbn.command.bytes_per_block import sum_by_section
from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.results import TITLES, Block, Measurement, Variant
from lightning_convbn.command.trade_off import draw_points, points_of
from lightning_convbn.memory.use import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[Variant, str] = {
    "eval": "#c2570c",
    "tune": "#0f766e",
    "tune-elementwise": "#1d4ed8",
    "tune-blocks": "#7c3aed",
    "deploy-copy": "#94a3b8",
}

TRADE_OFF_HEIGHT = 3.5  # inches


def check_plottable(path: Path) -> None:
    """Raise a `CommandError` if matplotlib is missing, or if it can't write files with this suffix."""
    if find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib; pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise CommandError(f"--plot {path}: the suffix must be one of {', '.join(f'.{name}' for name in formats)}")


def write_plot(path: Path, title: str, found: Measurement) -> None:
    """Draw the bytes that each section of the model keeps, one bar for each variant; and peak against step time.

    The second is left out if nothing was timed.

    Args:
        path: The file. `check_plottable` has accepted it. The suffix chooses the format.
        title: What was measured.
        found: What was found.
    """
    from matplotlib.figure import Figure

    variants = list(found.variants)
    sections = sum_by_section(found.blocks, variants)
    points = points_of(found)
    heights = [1.5 + 0.16 * (len(variants) + 1) * len(sections), *([TRADE_OFF_HEIGHT] if points else [])]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained", dpi=150)
    axes, *others = figure.subplots(len(heights), squeeze=False, height_ratios=heights).flat
    for other in others:
        draw_points(other, points, COLOURS)
    for place, variant in enumerate(variants):
        total = found.variants[variant].saved_bytes / MIB
        _draw_bars(axes, sections, variant, place, len(variants), f"{TITLES[variant]}, {total:,.1f} MiB kept in total")
    axes.set_yticks(range(len(sections)), [_literal(section.name) for section in sections])
    axes.invert_yaxis()
    axes.set_xlabel("MiB kept for the backward pass")
    axes.margins(x=0.08, y=0.01)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e2e8f0")
    axes.set_axisbelow(True)
    figure.suptitle(_literal(title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_bars(
    axes: Axes, sections: Sequence[Block], variant: Variant, place: int, variant_count: int, label: str
) -> None:
    """Draw the bars of one variant. Each bar has its size in MiB at its end."""
    sizes = [section.saved_bytes[variant] / MIB for section in sections]
    height = 0.8 / variant_count
    rows = [row + (place - (variant_count - 1) / 2) * height for row in range(len(sections))]
    bars = axes.barh(rows, sizes, height * 0.9, color=COLOURS[variant], label=label)
    texts = [f"{size:,.{1 if size >= 1 else 2}f}" for size in sizes]
    axes.bar_label(bars, texts, padding=3, fontsize=7, color="#475569")


def _literal(text: str) -> str:
    """Escape the dollar sign, because matplotlib would take it for the begin of a formula."""
    return text.replace("$", r"\$")
