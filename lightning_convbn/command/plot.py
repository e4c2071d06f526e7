"""Draws the picture of ``measure --plot``: peak against step time, and what the largest blocks keep."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.results import TITLES, Measurement, Variant
from lightning_convbn.memory.use import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[Variant, str] = {
    "train": "#1e293b",
    "train-elementwise": "#db2777",
    "train-blocks": "#eab308",
    "eval": "#c2570c",
    "tune": "#0f766e",
    "tune-elementwise": "#1d4ed8",
    "tune-blocks": "#7c3aed",
    "deploy-copy": "#94a3b8",
}
MOST_BLOCKS = 20  # that a picture shows


def check_plottable(path: Path) -> None:
    """Raise a `CommandError` if matplotlib is missing, or if it can't write files with this suffix."""
    if find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib; pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise CommandError(f"--plot {path}: the suffix must be one of {', '.join(f'.{name}' for name in formats)}")


def write_plot(path: Path, title: str, found: Measurement) -> None:
    """Write the picture. Peak against step time is left out if nothing was timed.

    Args:
        path: The file. `check_plottable` has accepted it. The suffix chooses the format.
        title: What was measured.
        found: What was found.
    """
    from matplotlib.figure import Figure

    bars = 1 + 0.08 * (len(found.variants) + 1) * min(len(found.blocks), MOST_BLOCKS)
    heights = [3.2, bars] if found.points() else [bars]
    figure = Figure(figsize=(9, 0.8 + sum(heights)), layout="constrained", dpi=150)
    *others, blocks = figure.subplots(len(heights), squeeze=False, height_ratios=heights).flat
    _draw_blocks(blocks, found)
    for axes in others:
        _draw_points(axes, found)
    for axes in (*others, blocks):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e2e8f0")
        axes.set_axisbelow(True)
    figure.suptitle(_literal(title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(*blocks.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_points(axes: Axes, found: Measurement) -> None:
    for variant, peak, time in found.points():
        axes.scatter([peak], [time], color=COLOURS[variant])
    _, peaks, times = zip(*found.points(), strict=True)
    axes.set(
        xlabel="peak of a step, MiB", ylabel="step time, ms", xlim=(0, 1.1 * max(peaks)), ylim=(0, 1.1 * max(times))
    )


def _draw_blocks(axes: Axes, found: Measurement) -> None:
    """Draw a bar for each variant of each of the largest blocks, in the order of the model."""
    largest = sorted(found.blocks, key=lambda block: max(block.saved_bytes.values()), reverse=True)[:MOST_BLOCKS]
    blocks = [block for block in found.blocks if block in largest]
    height = 0.8 / len(found.variants)
    for place, (variant, result) in enumerate(found.variants.items()):
        rows = [row - 0.4 + (place + 0.5) * height for row in range(len(blocks))]
        sizes = [block.saved_bytes[variant] / MIB for block in blocks]
        label = f"{TITLES[variant]}, {result.saved_bytes / MIB:,.1f} MiB in all blocks"
        axes.barh(rows, sizes, height, color=COLOURS[variant], label=label)
    axes.set_yticks(range(len(blocks)), [_literal(block.name) for block in blocks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    which = f"the {len(blocks)} blocks that keep most" if len(blocks) < len(found.blocks) else "all blocks"
    axes.set_xlabel(f"MiB kept for the backward pass, {which}")


def _literal(text: str) -> str:
    """Escape the dollar sign, because matplotlib would take it for the begin of a formula."""
    return text.replace("$", r"\$")
