"""Count the bytes that classifiers of torchvision and timm keep for the backward pass in each mode.

    python examples/benchmarks/memory.py

writes `docs/benchmarks/memory.json`, the page `docs/benchmarks/memory.md`, and two tables in `what-is-saved.md`.
The counts are exact. They are made on tensors without data, so they take minutes and little memory on any machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from examples import results_file
from examples.benchmarks.networks import build
from examples.results_file import BENCHMARKS, ROOT, fill
from lightning_convbn import fuse_for_deploy, measure_memory
from lightning_convbn.layers.supported_layers import is_norm
from lightning_convbn.memory import MIB, count_saved_bytes
from lightning_convbn.ops import convolution

NAMES = [
    "resnet18",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg16_bn",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "regnet_y_3_2gf",
    "timm:seresnet50",
    "timm:mixnet_s",
    "timm:nasnetalarge",
]
FROZEN = ["resnet50", "mobilenet_v2", "vgg16_bn", "densenet121", "efficientnet_b0"]
IMAGES = 10  # of the input gradients
SIZES = [(1, 64), (1, 224), (8, 224)]  # batch, pixels
INTRODUCTION = """# Memory kept for the backward pass

For users who want to know how much each mode keeps in a network of torchvision. The tables show MiB that one forward
pass keeps for the backward pass, in float32, without parameters and buffers. `python examples/benchmarks/memory.py`
counts them; nothing is estimated.

- *Tune as published* leaves the folding to autograd, which keeps every folded weight. The published implementations do
  this.
- *Tune + elementwise* is Tune mode with `recompute="elementwise"`. It does not keep what can be computed again,
  elementwise, from what is kept anyway.
- *Train* uses the statistics of the batch. It has a table of its own: without recomputation, and with
  `recompute="elementwise"` ([more](../use/train-from-scratch.md)). Only the BatchNorms are in their training state.
- *Deploy copy* is the trainable copy that `fuse_for_deploy` makes. It is the lower limit for every method that keeps
  the inputs of the convolutions."""
FROZEN_SAYS = """No parameter wants a gradient, as for adversarial examples or a saliency map. ReLU and its kin
then keep one bit for each value."""
EXCERPT = ["resnet50", "regnet_y_400mf", "mobilenet_v2", "efficientnet_b0", "densenet121"]  # the models in PAGE
PAGE = ROOT / "docs" / "understand" / "what-is-saved.md"
TRAIN_COLUMNS = {"train": "Train", "train_recompute": "**Train + elementwise**"}
COLUMNS = {
    "eval": "Eval",
    "tune_by_autograd": "Tune as published",
    "tune": "**Tune**",
    "tune_recompute": "**Tune + elementwise**",
    "deploy": "Deploy copy",
}


def main() -> None:
    """Count, write the JSON, write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [row for name in NAMES for row in count(name)]
    frozen = [count_frozen(name) for name in FROZEN]
    unit = "MiB kept for backward by one forward, float32, parameters and buffers excluded"
    packages = ("torch", "torchvision", "timm")
    results_file.write_json(BENCHMARKS / "memory.json", rows, packages, unit=unit, input_gradients=frozen)
    (BENCHMARKS / "memory.md").write_text(as_markdown(rows, frozen))
    fill(PAGE, excerpts(rows))
    print(f"wrote memory.json and memory.md in {BENCHMARKS}, and the tables in {PAGE}")


def count(name: str) -> Iterator[dict[str, Any]]:
    """Yield a row per input size of one classifier."""
    model, _ = build(name)
    fused = fuse_for_deploy(model)
    for batch, pixels in SIZES:
        pixels = max(pixels, 96) if name == "inception_v3" else pixels  # it takes nothing smaller
        with FakeTensorMode(allow_non_fake_inputs=True):
            images = torch.empty(batch, 3, pixels, pixels)
            kept = {mode: measure_memory(model, images, mode=mode).saved_bytes for mode in ("eval", "tune")}
            recomputing = measure_memory(model, images, mode="tune", recompute="elementwise")
            kept["tune_recompute"] = recomputing.saved_bytes
            with folding_by_autograd():
                kept["tune_by_autograd"] = measure_memory(model, images, mode="tune").saved_bytes
            kept["deploy"] = count_saved_bytes(fused, images)
            if batch > 1:  # one image has no statistics where a layer is 1 × 1
                with statistics_of_the_batch(model):
                    kept["train"] = measure_memory(model, images, mode="train").saved_bytes
                    recomputing = measure_memory(model, images, mode="train", recompute="elementwise")
                kept["train_recompute"] = recomputing.saved_bytes
        print(name, batch, pixels, {mode: round(size / MIB, 2) for mode, size in kept.items()}, flush=True)
        mib = {mode: round(kept[mode] / MIB, 3) for mode in (*COLUMNS, *TRAIN_COLUMNS) if mode in kept}
        yield {"model": name, "batch": batch, "pixels": pixels, **mib}


def count_frozen(name: str) -> dict[str, Any]:
    """Return what is kept for the gradient of the images alone, if no parameter wants one."""
    model = build(name)[0].requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(IMAGES, 3, 224, 224, requires_grad=True)
        kept = {
            "eval": measure_memory(model, images, mode="eval"),
            "tune": measure_memory(model, images, mode="tune"),
            "tune_recompute": measure_memory(model, images, mode="tune", recompute="elementwise"),
        }
    return {
        "model": name,
        "batch": IMAGES,
        "pixels": 224,
        **{key: round(use.saved_mib, 3) for key, use in kept.items()},
    }


@contextmanager
def statistics_of_the_batch(model: nn.Module) -> Iterator[None]:
    """Put the BatchNorms alone in their training state. So dropout and auxiliary heads are as in the other modes."""
    norms = [module for module in model.modules() if is_norm(module)]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()


@contextmanager
def folding_by_autograd() -> Iterator[None]:
    """Leave no recipe in the graph, as published. Autograd then keeps every folded weight."""
    with mock.patch.object(convolution, "takes_recipes", _takes_none):
        yield


def _takes_none(output: Tensor) -> bool:
    """Refuse recipes. A ``Mock`` would hold the outputs that it is called with, and they would be counted."""
    return False


def as_markdown(rows: list[dict[str, Any]], frozen: list[dict[str, Any]]) -> str:
    """Draw the page of the docs."""
    lines = [INTRODUCTION]
    for batch, pixels in SIZES:
        chosen = [row for row in rows if row["batch"] == batch and (row["pixels"] == 224) == (pixels == 224)]
        lines += ["", f"## Batch {batch}, {pixels} px", "", *table(chosen, pixels)]
        if batch > 1:
            lines += ["", "### With the statistics of the batch", "", *train_table(chosen)]
    lines += ["", f"## Gradients of the input alone, batch {IMAGES}, 224 px", "", FROZEN_SAYS, ""]
    lines += ["| model | Eval | **Tune** | **Tune + elementwise** |", "|---|---:|---:|---:|"]
    keys = ("eval", "tune", "tune_recompute")
    lines += [f"| {row['model']} | {' | '.join(f'{row[key]:.1f}' for key in keys)} |" for row in frozen]
    return "\n".join(lines) + "\n"


def excerpts(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Draw some of the rows for a page: mark -> table."""
    chosen = [row for row in rows if row["model"] in EXCERPT and (row["batch"], row["pixels"]) == (8, 224)]
    return {"memory": table(chosen, 224), "memory-train": train_table(chosen)}


def table(rows: list[dict[str, Any]], pixels: int) -> list[str]:
    """Draw one table. A model that needs larger images has their size beside its name."""
    headers = [*COLUMNS.values(), "Tune / Deploy", "elementwise", "saved against Eval", "elementwise"]
    lines = [f"| model | {' | '.join(headers)} |", "|---|" + "---:|" * len(headers)]
    for row in rows:
        name = row["model"] if row["pixels"] == pixels else f"{row['model']} ({row['pixels']} px)"
        tunes = [row["tune"], row["tune_recompute"]]
        cells = [f"{row[mode]:.1f}" for mode in COLUMNS]
        cells += [f"{tune / row['deploy']:.3f}" for tune in tunes]
        cells += [f"{100 * (1 - tune / row['eval']):.0f} %" for tune in tunes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def train_table(rows: list[dict[str, Any]]) -> list[str]:
    """Draw what Train mode keeps, without and with recomputation."""
    lines = [f"| model | {' | '.join(TRAIN_COLUMNS.values())} | saved |", "|---|---:|---:|---:|"]
    for row in rows:
        before, after = (row[key] for key in TRAIN_COLUMNS)
        lines.append(f"| {row['model']} | {before:.1f} | {after:.1f} | {100 * (1 - after / before):.0f} % |")
    return lines


if __name__ == "__main__":
    main()
