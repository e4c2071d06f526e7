"""A picture of what each block keeps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.measurement import TITLES, Measurement, Variant
from lightning_convbn.memory import MIB

COLOURS: dict[Variant, str] = {"eval": "#c2570c", "tune": "#0f766e", "deploy": "#94a3b8"}


def check_plottable(path: Path) -> None:
    """Raise a `CommandError` if matplotlib is missing or has no format for the suffix of ``path``."""
    if find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib; pip install lightning-convbn[cli]")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise CommandError(f"--plot {path}: the suffix must be one of {', '.join(f'.{name}' for name in formats)}")


def write_plot(path: Path, title: str, measurement: Measurement) -> None:
    """Draw the bytes kept by part of the model, mode by mode, and write the picture in the format of the suffix.

    Args:
        path: The file, checked by `check_plottable`.
        title: What was measured.
        measurement: What was found.
    """
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(block.part for block in measurement.blocks))
    variants = list(measurement.figures)
    figure = Figure(figsize=(9, 1.5 + 0.16 * (len(variants) + 1) * len(parts)), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    height = 0.8 / len(variants)
    for place, variant in enumerate(variants):
        sizes = [
            sum(block.saved_bytes[variant] for block in measurement.blocks if block.part == part) / MIB
            for part in parts
        ]
        total = measurement.figures[variant].saved_bytes / MIB
        bars = axes.barh(
            [row + (place - (len(variants) - 1) / 2) * height for row in range(len(parts))],
            sizes,
            height * 0.9,
            color=COLOURS[variant],
            label=f"{TITLES[variant]}, {total:,.1f} MiB in all",
        )
        axes.bar_label(
            bars, [f"{size:,.{1 if size >= 1 else 2}f}" for size in sizes], padding=3, fontsize=7, color="#475569"
        )
    axes.set_yticks(range(len(parts)), [part.replace("$", r"\$") for part in parts])  # "$" would begin a formula
    axes.invert_yaxis()
    axes.set_xlabel("MiB kept for the backward pass")
    axes.margins(x=0.08, y=0.01)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e2e8f0")
    axes.set_axisbelow(True)
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(loc="outside lower left", ncols=len(variants), frameon=False, fontsize=9)
    figure.savefig(path)
