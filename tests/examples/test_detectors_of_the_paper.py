"""The paper's detectors: what is counted without data is what a real training step of torchvision's detector needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.allocator import allocated_by
from torch import Tensor
from torchvision.models.detection import faster_rcnn, retinanet
from torchvision.models.detection.image_list import ImageList

from examples import results_file
from examples.benchmarks import detectors_of_the_paper as script
from examples.benchmarks import detectors_of_the_paper_page as page
from examples.benchmarks.allocator import peak_by_allocator
from examples.benchmarks.detector_steps import OneKernel, training_step
from lightning_convbn import Mode, Recompute, find_conv_bn_pairs, set_mode
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


def test_the_page_comes_from_the_committed_counts() -> None:
    report = json.loads((results_file.BENCHMARKS / "detectors_of_the_paper.json").read_text())
    text = page.PAGE.read_text()
    assert results_file.filled(text, page.tables(report)) == text
    assert f"within {page.TOLERANCE_PERCENT} %" in text
    paper = [tuple(vars(row).values()) for row in script.PAPER]
    assert [tuple(row[key] for key in vars(script.PAPER[0])) for row in report["rows"]] == paper
