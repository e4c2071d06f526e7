"""Measure one training step of torchvision's detectors in Eval and in Tune mode.

    python examples/benchmarks/detectors.py

writes `docs/benchmarks/detectors.json` and `docs/benchmarks/detectors.md`. Kept bytes are counted. Step times are
medians over interleaved rounds in one process; compare only their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.ops import misc

from examples.benchmarks.random_statistics import give_statistics
from examples.results_file import BENCHMARKS, fill, markdown_table, write_json
from lightning_convbn import Mode, measure_memory, set_mode
from lightning_convbn.memory import MIB

DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "Faster R-CNN": FasterRCNN,
    "RetinaNet": RetinaNet,
    "Mask R-CNN": MaskRCNN,
}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "BatchNorm2d (mmdetection's habit)": nn.BatchNorm2d,
    "FrozenBatchNorm2d (torchvision's)": misc.FrozenBatchNorm2d,
}
BATCH, PIXELS = 2, 128


def main() -> None:
    """Measure, write the JSON, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of one step per mode")
    rounds: int = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    rows = []
    for detector in DETECTORS:
        for norm in NORMS:
            rows.append(measure(detector, norm, rounds))
            print(rows[-1], flush=True)
    write_json(BENCHMARKS / "detectors.json", rows, ("torch", "torchvision"), threads=torch.get_num_threads())
    fill(BENCHMARKS / "detectors.md", {"table": table(rows)})


def measure(detector: str, norm: str, rounds: int) -> dict[str, Any]:
    """Compare Eval and Tune on one detector."""
    torch.manual_seed(0)
    model = build(detector, NORMS[norm])
    images = [torch.rand(3, PIXELS, PIXELS) for _ in range(BATCH)]
    targets = [target(PIXELS) for _ in range(BATCH)]
    batch = torch.stack(images)
    modes: tuple[Mode, ...] = ("eval", "tune")
    kept = {mode: measure_memory(model.get_submodule("backbone"), batch, mode=mode).saved_bytes for mode in modes}
    losses = {}
    seconds: dict[Mode, list[float]] = {mode: [] for mode in modes}
    for number in range(rounds + 1):
        for mode in modes if number % 2 else reversed(modes):
            set_mode(model, mode)
            torch.manual_seed(number)  # the detectors sample proposals
            started = time.perf_counter()
            losses[mode] = sum(model(images, targets).values())
            losses[mode].backward()
            if number:  # the first round warms up
                seconds[mode].append(time.perf_counter() - started)
            model.zero_grad()
    ratios = [tune / eval_ for tune, eval_ in zip(seconds["tune"], seconds["eval"], strict=True)]
    return {
        "detector": detector,
        "norm": norm,
        "eval_mib": round(kept["eval"] / MIB, 1),
        "tune_mib": round(kept["tune"] / MIB, 1),
        "loss_difference": abs(float(losses["tune"] / losses["eval"]) - 1),
        "step_time_ratio": round(statistics.median(seconds["tune"]) / statistics.median(seconds["eval"]), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": rounds,
    }


def build(detector: str, norm: Callable[..., nn.Module]) -> nn.Module:
    """Build a detector in training state on a ResNet-50 FPN with random statistics."""
    body = resnet50(weights=None, norm_layer=norm)
    give_statistics(body)
    backbone: BackboneWithFPN = _resnet_fpn_extractor(body, 5)
    return DETECTORS[detector](backbone, num_classes=5, min_size=PIXELS, max_size=PIXELS).train()


def target(pixels: int) -> dict[str, Tensor]:
    """Return two boxes with labels and masks."""
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]]) * pixels
    masks = torch.zeros(2, pixels, pixels, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Draw the table of the page."""
    lines = []
    for row in rows:
        saved = f"{100 * (1 - row['tune_mib'] / row['eval_mib']):.0f} %"
        low, high = row["ratio_spread"]
        sizes = [f"{row['eval_mib']:.1f}", f"{row['tune_mib']:.1f}", saved]
        time = f"{row['step_time_ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append([row["detector"], row["norm"], *sizes, time])
    header = ["detector", "BatchNorm", "Eval kept, MiB", "Tune kept, MiB", "saved", "step time, Tune / Eval"]
    return markdown_table(header, lines, words=(0, 1))


if __name__ == "__main__":
    main()
