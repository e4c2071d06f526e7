"""Count the training steps of the paper's table of detectors, at their real sizes.

    python examples/benchmarks/detectors_of_the_paper.py

writes `docs/benchmarks/detectors_of_the_paper.json` and the page `docs/benchmarks/detectors-of-the-paper.md`. The
counts are made on tensors without data, so they take minutes and little memory on any machine.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, regnet_x_3_2gf
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from examples.benchmarks import detectors_of_the_paper_page as page
from examples.benchmarks.detector_steps import training_step
from examples.benchmarks.memory import folding_by_autograd
from examples.results_file import BENCHMARKS, fill, write_json
from lightning_convbn import Mode, Recompute, find_conv_bn_pairs
from lightning_convbn.memory import MIB, measure_memory_abstractly

CLASSES = 80
CHANNELS = 256
HEIGHT, WIDTH = 800, 1344


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table, with its GB in Eval and in Tune mode."""

    detector: str
    backbone: str
    batch: int
    precision: str
    eval: float
    tune: float


PAPER = [
    PaperRow("Faster R-CNN", "ResNet-50", 2, "fp32", 3.857, 3.003),
    PaperRow("Mask R-CNN", "ResNet-50", 2, "fp32", 4.329, 3.470),
    PaperRow("Mask R-CNN", "ResNet-101", 16, "fp16", 13.687, 9.980),
    PaperRow("RetinaNet", "ResNet-50", 2, "fp32", 3.631, 2.774),
    PaperRow("Faster R-CNN", "ResNet-101", 2, "fp32", 5.781, 4.183),
    PaperRow("Faster R-CNN", "ResNet-101", 2, "fp16", 3.849, 3.138),
    PaperRow("Faster R-CNN", "ResNet-101", 8, "fp16", 10.411, 7.036),
    PaperRow("Faster R-CNN", "ResNet-101", 16, "fp16", 19.799, 12.901),
    PaperRow("Faster R-CNN", "ResNeXt-101", 2, "fp32", 6.980, 4.773),
    PaperRow("Faster R-CNN", "RegNet", 2, "fp32", 4.361, 3.138),
    PaperRow("Faster R-CNN", "HRNet", 2, "fp32", 8.504, 5.463),
]
HALF_BATCH = replace(PAPER[2], batch=8)  # the paper's figures look like those of this batch
PUBLISHED = "tune_as_published"
VARIANTS: dict[str, tuple[Mode, Recompute]] = {
    "eval": ("eval", "none"),
    PUBLISHED: ("tune", "none"),
    "tune": ("tune", "none"),
    "tune_elementwise": ("tune", "elementwise"),
    "tune_blocks": ("tune", "blocks"),
}


def main() -> None:
    """Count every row, write the JSON, write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for row in PAPER:
        rows.append(count(row))
        print(json.dumps(rows[-1]), flush=True)
    facts = {"height": HEIGHT, "width": WIDTH, "half_batch": count(HALF_BATCH)}
    path = write_json(BENCHMARKS / "detectors_of_the_paper.json", rows, ("torch", "torchvision", "timm"), **facts)
    fill(page.PAGE, page.tables(json.loads(path.read_text())))


def count(row: PaperRow, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    """Count one row in each variant."""
    detector = build(row.detector, row.backbone)
    step = training_step(detector, half=row.precision == "fp16")
    fixed = sum(tensor.nbytes for tensor in [*detector.parameters(), *detector.buffers()])
    images, pairs = torch.empty(row.batch, 3, height, width), find_conv_bn_pairs(step)
    counted = {}
    for key, (mode, recompute) in VARIANTS.items():
        with folding_by_autograd() if key == PUBLISHED else nullcontext():
            use = measure_memory_abstractly(
                step, [images], {}, mode=mode, pairs=pairs, recompute=recompute, optimizer="sgd", allow_real_run=False
            )
        assert use.peak_mib is not None
        counted[key] = {"kept_mib": round(use.saved_mib, 1), "peak_mib": round(use.peak_mib, 1)}
    return {**vars(row), "folded": len(pairs), "fixed_mib": round(fixed / MIB, 1), "counted": counted}


def build(detector: str, backbone: str) -> Any:
    """Build a detector as MMDetection trains it: with 80 classes, and with the first stage of most backbones frozen."""
    if detector == "RetinaNet":
        return RetinaNet(pyramid(backbone, LastLevelP6P7(2048, CHANNELS)), CLASSES).train()
    return {"Faster R-CNN": FasterRCNN, "Mask R-CNN": MaskRCNN}[detector](pyramid(backbone), CLASSES + 1).train()


def pyramid(backbone: str, extra: nn.Module | None = None) -> nn.Module:
    """Build a backbone with its pyramid of features.

    Args:
        backbone: One of the paper.
        extra: What makes two further levels, in the place of the first one. None: a max-pool makes one.
    """
    if backbone == "HRNet":
        return HighResolutionPyramid("hrnet_w32")
    body, widths, frozen = BODIES[backbone]()
    for name in frozen:
        body.get_submodule(name).requires_grad_(False)
    stages = [name for name in dict(body.named_children()) if name.startswith(("layer", "block"))]
    if extra:
        stages, widths = stages[1:], widths[1:]
    levels = {stage: str(number) for number, stage in enumerate(stages)}
    return BackboneWithFPN(body, levels, widths, CHANNELS, extra)  # type: ignore[no-any-return]


def resnet(depth: Sequence[int], groups: int = 1, width: int = 64) -> tuple[nn.Module, list[int], list[str]]:
    """Build a ResNet or ResNeXt; return it, the channels of its stages, and what of it is frozen."""
    body = ResNet(Bottleneck, [*depth], groups=groups, width_per_group=width)
    return body, [256, 512, 1024, 2048], ["conv1", "bn1", "layer1"]


def regnet() -> tuple[nn.Module, list[int], list[str]]:
    """Build RegNetX-3.2GF; return what `resnet` does."""
    plain = regnet_x_3_2gf()
    body = nn.Sequential(OrderedDict([("stem", plain.stem), *plain.trunk_output.named_children()]))
    return body, [96, 192, 432, 1008], ["stem", "block1"]


BODIES: dict[str, Callable[[], tuple[nn.Module, list[int], list[str]]]] = {
    "ResNet-50": lambda: resnet([3, 4, 6, 3]),
    "ResNet-101": lambda: resnet([3, 4, 23, 3]),
    "ResNeXt-101": lambda: resnet([3, 4, 23, 3], groups=32, width=4),
    "RegNet": regnet,
}


class HighResolutionPyramid(nn.Module):
    """HRNet with its pyramid, HRFPN: all branches are scaled to the largest and mixed; pools make the other levels.

    Args:
        name: Name of the network in timm.
    """

    LEVELS = ("0", "1", "2", "3", "pool")

    def __init__(self, name: str) -> None:
        super().__init__()
        body: Any = timm.create_model(name, features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
        self.body = body
        self.mix = nn.Conv2d(sum(body.feature_info.channels()), CHANNELS, 1)
        self.convolutions = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in self.LEVELS)
        self.out_channels = CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return a map of features for each level, the largest first."""
        first, *others = self.body(images)
        scaled = [F.interpolate(one, scale_factor=2**level, mode="bilinear") for level, one in enumerate(others, 1)]
        mixed = self.mix(torch.cat([first, *scaled], 1))
        maps = [mixed, *(F.avg_pool2d(mixed, 2**level) for level in range(1, len(self.LEVELS)))]
        return {name: layer(one) for name, layer, one in zip(self.LEVELS, self.convolutions, maps, strict=True)}


if __name__ == "__main__":
    main()
