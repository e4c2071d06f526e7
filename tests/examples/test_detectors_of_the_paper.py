"""The paper's detectors: what is counted without data is what a real training step of torchvision's detector needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.allocator import allocated_by
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, retinanet
from torchvision.models.detection.image_list import ImageList

from examples import results_file
from examples.benchmarks import detectors_of_the_paper as script
from examples.benchmarks import detectors_of_the_paper_page as page
from examples.benchmarks.allocator import peak_by_allocator
from examples.benchmarks.detector_steps import OneKernel, training_step
from examples.benchmarks.memory import folding_by_autograd
from lightning_convbn import Mode, Recompute, find_conv_bn_pairs, measure_memory, set_mode
from lightning_convbn.memory import measure_memory_abstractly

pytestmark = pytest.mark.slow  # a benchmark of the authors, which no user runs

DETECTORS = ("Faster R-CNN", "Mask R-CNN", "RetinaNet")
BATCH, PIXELS, PROPOSALS = 2, 128, 32
LEVELS: list[tuple[Mode, Recompute]] = [
    ("eval", "none"),
    ("tune", "none"),
    ("tune", "elementwise"),
    ("tune", "blocks"),
]
CPU = torch.device("cpu")


def small_detector(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A detector with few weights: activations should weigh, not gradients."""
    monkeypatch.setitem(script.BODIES, "tiny", lambda: script.resnet([1, 2, 1, 1]))
    torch.manual_seed(0)
    detector = script.build(name, "tiny")
    if name != "RetinaNet":
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = PROPOSALS
        detector.roi_heads.box_head = faster_rcnn.TwoMLPHead(256 * 7 * 7, 32)
        detector.roi_heads.box_predictor = faster_rcnn.FastRCNNPredictor(32, script.CLASSES + 1)
    return detector


def real_losses(detector: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], list[Tensor]]:
    """The losses of a real training step of torchvision's detector, on images that have the right size already.

    There are so many boxes that the heads get as many proposals on objects as they may. RetinaNet gets one, because it
    leaves out anchors that are near a box, but not on it.
    """
    count = 1 if isinstance(detector, retinanet.RetinaNet) else 20
    corners = torch.rand(BATCH, count, 2) * 0.6 * PIXELS
    boxes = torch.cat([corners, corners + (0.15 + 0.2 * torch.rand(BATCH, count, 2)) * PIXELS], 2)
    labels, masks = torch.ones(count, dtype=torch.long), torch.zeros(count, PIXELS, PIXELS, dtype=torch.uint8)
    targets = [{"boxes": of_image, "labels": labels, "masks": masks} for of_image in boxes]
    sizes = [(PIXELS, PIXELS)] * BATCH
    monkeypatch.setattr(detector.transform, "forward", lambda images, targets: (ImageList(images, sizes), targets))
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss", lambda logits, *_, **__: OneKernel.apply(logits).sum())
    return lambda images: [*detector(images, targets).values()]


@pytest.mark.parametrize("name", DETECTORS)
def test_the_counted_step_needs_what_a_real_training_step_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small_detector(name, monkeypatch)
    losses, images = real_losses(detector, monkeypatch), torch.rand(BATCH, 3, PIXELS, PIXELS)
    step = training_step(detector)
    pairs = find_conv_bn_pairs(step)
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(losses(images.clone())), trained, allow_unused=True)  # type: ignore[arg-type]

    for mode, recompute in LEVELS:
        use = measure_memory_abstractly(
            step, [images], {}, mode=mode, pairs=pairs, recompute=recompute, allow_real_run=False
        )
        set_mode(step, mode, pairs=pairs, recompute=recompute)
        gradients()  # oneDNN allocates more the first time
        kept = allocated_by(lambda: [loss.grad_fn for loss in losses(images.clone())], CPU).kept
        peak = peak_by_allocator(gradients, count_workspaces=False)
        set_mode(step, "train")
        assert use.peak_bytes is not None
        print(f"{name} {mode} {recompute}: {use.saved_bytes / kept - 1:+.5f}, {use.peak_bytes / peak - 1:+.5f}")
        assert use.saved_bytes == pytest.approx(kept, rel=page.TOLERANCE_PERCENT / 100), f"{mode}, {recompute}"
        assert use.peak_bytes == pytest.approx(peak, rel=page.TOLERANCE_PERCENT / 100), f"{mode}, {recompute}"


def test_under_autocast_what_is_counted_is_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, images = small_detector("Faster R-CNN", monkeypatch), torch.rand(1, 3, 64, 64)
    step = training_step(detector, half=True)
    for mode in ("eval", "tune"):
        counted = measure_memory_abstractly(step, [images], {}, mode=mode, allow_real_run=False).saved_bytes
        set_mode(step, mode)
        kept = allocated_by(lambda: [loss.grad_fn for loss in step(images.clone())], CPU).kept
        set_mode(step, "train")
        assert counted == pytest.approx(kept, rel=page.TOLERANCE_PERCENT / 100), mode


@pytest.mark.parametrize("backbone", [*script.BODIES, "HRNet"])
def test_each_backbone_is_folded_and_frozen_as_mmdetection_freezes_it(backbone: str) -> None:
    """The stem and the first stage: 11 BatchNorms of a ResNet, 8 of this RegNet."""
    detector = script.build("Faster R-CNN", backbone)
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(find_conv_bn_pairs(training_step(detector))) == len(norms)
    frozen = [norm for norm in norms if not norm.weight.requires_grad]
    assert len(frozen) == {"RegNet": 8, "HRNet": 0}.get(backbone, 11)


def test_a_row_has_the_paper_s_figures_and_those_of_each_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    small_detector("RetinaNet", monkeypatch)
    row = script.count(script.PaperRow("RetinaNet", "tiny", 1, "fp16", 2.0, 1.0), 64, 64)
    assert (row["eval"], row["tune"]) == (2.0, 1.0)
    kept = {variant: sizes["kept_mib"] for variant, sizes in row["counted"].items()}
    assert list(kept) == list(page.TITLES)
    assert kept["eval"] > kept["tune"] >= kept["tune_elementwise"]
    assert kept["tune_as_published"] > kept["tune"]


def test_tune_as_published_keeps_every_folded_weight() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)) for _ in range(3)))
    batch = torch.rand(2, 8, 16, 16, requires_grad=True)
    kept = measure_memory(net, batch, mode="tune").saved_bytes
    with folding_by_autograd():
        published = measure_memory(net, batch, mode="tune").saved_bytes
    assert published == kept + sum(block[0].weight.nbytes for block in net)


def test_the_page_comes_from_the_committed_counts() -> None:
    report = json.loads((results_file.BENCHMARKS / "detectors_of_the_paper.json").read_text())
    assert (results_file.BENCHMARKS / page.NAME).read_text() == page.as_markdown(report)
    paper = [tuple(vars(row).values()) for row in script.PAPER]
    assert [tuple(row[key] for key in vars(script.PAPER[0])) for row in report["rows"]] == paper
