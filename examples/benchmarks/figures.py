"""Draw the pictures of the README and the docs.

    python examples/benchmarks/figures.py

writes `docs/figures/memory.svg` from the counts in `docs/benchmarks/memory.json`, and `docs/figures/modes.svg`, which
shows what each mode computes and keeps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from examples.results_file import BENCHMARKS, ROOT
from lightning_convbn.command.plot import COLOURS

FOLDER = ROOT / "docs" / "figures"
BATCH, PIXELS = 8, 224
MODELS = ["resnet50", "regnet_y_400mf", "mobilenet_v2", "efficientnet_b0", "densenet121"]
BARS = {  # key of the counts -> colour and name
    "train": ("#7c8594", "Train"),
    "train_recompute": ("#b07aa1", "Train + elementwise"),
    "eval": (COLOURS["eval"], "Eval"),
    "tune_by_autograd": ("#e0a458", "Tune as published"),
    "tune": (COLOURS["tune"], "Tune"),
    "tune_recompute": ("#5eaaa2", "Tune + elementwise"),
}
# An opaque light panel, so that the text can be read on light and on dark pages; the same bytes on every run.
PAPER, INK, FAINT = "#f8fafc", "#1e293b", "#64748b"
OVER_THE_LINE = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}  # around a number, so that no line crosses it
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.labelcolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": PAPER,
    "grid.color": "#e2e8f0",
    "mathtext.fontset": "dejavuserif",
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "lightning_convbn",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
}


def main() -> None:
    """Draw both."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = json.loads((BENCHMARKS / "memory.json").read_text())["rows"]
    for path in (draw_memory(rows, FOLDER / "memory.svg"), draw_modes(FOLDER / "modes.svg")):
        print(f"wrote {path}")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, without the date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15, metadata={"Date": None})
    return path


@mpl.rc_context(STYLE)
def draw_memory(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the MiB that each mode keeps, model by model, with the Deploy copy's as the floor."""
    found = {row["model"]: row for row in rows if (row["batch"], row["pixels"]) == (BATCH, PIXELS)}
    figure = Figure(figsize=(6.6, 7.0), layout="constrained")
    axes = figure.add_subplot()
    height = 0.82 / len(BARS)
    for place, (key, (colour, label)) in enumerate(BARS.items()):
        sizes = [found[model][key] for model in MODELS]
        middles = [row + (place - (len(BARS) - 1) / 2) * height for row in range(len(MODELS))]
        bars = axes.barh(middles, sizes, 0.9 * height, color=colour, label=label)
        axes.bar_label(bars, [f"{size:.0f}" for size in sizes], padding=4, fontsize=8, bbox=OVER_THE_LINE)
    floors = [found[model]["deploy"] for model in MODELS]
    tops, bottoms = ([row + side * 0.44 for row in range(len(MODELS))] for side in (-1, 1))
    floor = axes.vlines(floors, tops, bottoms, color=INK, linestyle=(0, (2, 1.5)), linewidth=1.2)
    floor.set_label("a trainable Deploy copy")
    axes.set_yticks(range(len(MODELS)), MODELS, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlabel("MiB kept for the backward pass (less is better)")
    axes.margins(x=0.06, y=0.02)
    figure.suptitle(f"What one forward pass keeps: batch {BATCH}, {PIXELS} px, float32", fontweight="bold", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


KINDS: dict[str, dict[str, Any]] = {  # styles of the boxes, by what they mean for the memory
    "kept": {"facecolor": "#f6c9a8", "edgecolor": COLOURS["eval"]},
    "output": {"facecolor": "white", "edgecolor": FAINT},
    "again": {"facecolor": "white", "edgecolor": COLOURS["tune"], "linestyle": "--"},
    "given": {"facecolor": "#e2e8f0", "edgecolor": "#e2e8f0"},
    "operation": {"facecolor": INK, "edgecolor": INK},
}
LEGEND = {
    "kept": "kept for the backward pass",
    "output": "for the next layer to keep",
    "again": "computed again in the backward pass",
    "given": "parameters and statistics",
}
NORM = r"$\gamma,\ \beta,\ \mu,\ \sigma^2$"
MODES: dict[str, tuple[dict[str, tuple[float, float, str, str]], list[tuple[str, str]]]] = {
    # mode -> its boxes (x, y, text, kind) and its arrows
    "Eval": (
        {
            "x": (1, 0, "$x$", "kept"),
            "conv": (3.1, 0, "conv", "operation"),
            "w": (3.1, 1, "$w$", "given"),
            "y": (5.2, 0, "$y$", "kept"),
            "bn": (7.3, 0, "BN", "operation"),
            "norm": (7.3, 1, NORM, "given"),
            "z": (9.4, 0, "$z$", "output"),
        },
        [("x", "conv"), ("w", "conv"), ("conv", "y"), ("y", "bn"), ("norm", "bn"), ("bn", "z")],
    ),
    "Tune": (
        {
            "x": (1, 0, "$x$", "kept"),
            "w": (1, 1.45, "$w$", "given"),
            "norm": (1, 0.75, NORM, "given"),
            "fold": (3.1, 1.1, "fold", "operation"),
            "folded": (5.2, 1.1, "$w',\\ b'$", "again"),
            "conv": (5.2, 0, "conv", "operation"),
            "z": (9.4, 0, "$z$", "output"),
        },
        [("x", "conv"), ("w", "fold"), ("norm", "fold"), ("fold", "folded"), ("folded", "conv"), ("conv", "z")],
    ),
    "Deploy": (
        {
            "x": (1, 0, "$x$", "kept"),
            "folded": (5.2, 1, "$w',\\ b'$", "given"),
            "conv": (5.2, 0, "conv", "operation"),
            "z": (9.4, 0, "$z$", "output"),
        },
        [("x", "conv"), ("folded", "conv"), ("conv", "z")],
    ),
}
SAYS = {
    "Eval": "$y$ is kept: the gradient of $\\gamma$ is a sum over it",
    "Tune": "no $y$; gradients reach $w$, $\\gamma$ and $\\beta$",
    "Deploy": "no $y$; gradients reach $w'$ and $b'$ only: unstable",
}


@mpl.rc_context(STYLE)
def draw_modes(path: Path) -> Path:
    """Draw the computation graph of a pair in three modes, with what is kept for the backward pass."""
    figure = Figure(figsize=(6.6, 5.8), layout="constrained")
    for axes, (mode, (boxes, arrows)) in zip(figure.subplots(len(MODES)), MODES.items(), strict=True):
        axes.set(xlim=(0, 10.4), ylim=(-0.4, 1.75))
        axes.axis("off")
        axes.set_title(f"{mode} mode", loc="left", fontsize=12, fontweight="bold", color=INK)
        axes.set_title(SAYS[mode], loc="right", fontsize=9.5, color=FAINT)
        draw_graph(axes, boxes, arrows)
    patches = [Patch(**KINDS[kind], label=text) for kind, text in LEGEND.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    return save(figure, path)


def draw_graph(axes: Axes, boxes: dict[str, tuple[float, float, str, str]], arrows: Sequence[tuple[str, str]]) -> None:
    """Draw boxes and arrows between them."""
    drawn = {}
    for name, (x, y, text, kind) in boxes.items():
        shape = "round,pad=0.5" if kind == "operation" else "square,pad=0.5"
        colour = "white" if kind == "operation" else INK
        box = {"boxstyle": shape, **KINDS[kind]}
        drawn[name] = axes.text(x, y, text, ha="center", va="center", fontsize=12, color=colour, bbox=box)
    for source, target in arrows:
        axes.annotate(
            "",
            boxes[target][:2],
            boxes[source][:2],
            arrowprops={
                "arrowstyle": "-|>",
                "color": FAINT,
                "patchA": drawn[source].get_bbox_patch(),
                "patchB": drawn[target].get_bbox_patch(),
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


if __name__ == "__main__":
    main()
