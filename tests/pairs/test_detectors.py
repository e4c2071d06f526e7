"""torchvision's detectors: one training step in Tune mode against one in Eval mode.

Their own norm, FrozenBatchNorm2d, needs no gradient for its scale, so autograd keeps no output of a convolution for it
even in Eval mode: folding it saves time, and must not cost memory. BatchNorm2d in Eval mode is mmdetection's habit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.comparing import BACKWARD, assert_close
from helpers.model_checks import Counts, randomized
from helpers.networks import images
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from lightning_convbn import Mode, find_conv_bn_pairs, measure_memory, set_mode

SIZE = 128
DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "faster_rcnn_mobilenet": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
    "faster_rcnn": detection.fasterrcnn_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "mask_rcnn": detection.maskrcnn_resnet50_fpn,
}
COUNTS = {"faster_rcnn_mobilenet": Counts(46, 0)}
NORMS: dict[str, type[nn.Module]] = {"frozen": FrozenBatchNorm2d, "batch_norm": nn.BatchNorm2d}
# Share of what Eval mode keeps for the backward pass of a backbone with BatchNorm2d, all layers trained, that Tune mode
# saves: one image of 128 px, float32, counted by the bytes alive (measure_memory).
SAVED = {"faster_rcnn_mobilenet": 0.39, "faster_rcnn": 0.49}

Target = dict[str, Tensor]


def detector(name: str, norm: str) -> nn.Module:
    """Build a detector for small images in its training state, all layers trainable, with random weights."""
    torch.manual_seed(0)
    model = DETECTORS[name](
        weights=None,
        weights_backbone=None,
        num_classes=3,
        min_size=SIZE,
        max_size=SIZE,
    )
    swap_norms(model.backbone, NORMS[norm])
    return randomized(model).train()


def swap_norms(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a backbone the other kind of norm: torchvision takes frozen ones only with pretrained weights."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, FrozenBatchNorm2d)) and type(child) is not cls:
            setattr(module, name, cls(len(child.running_mean), eps=child.eps))
        else:
            swap_norms(child, cls)


def batch(dtype: torch.dtype) -> tuple[list[Tensor], list[Target]]:
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    masks[0, 10:60, 10:60] = masks[1, 40:120, 30:100] = 1
    boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0], [30.0, 40.0, 100.0, 120.0]], dtype=dtype)
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}
    return [image.sigmoid() for image in images(2, 3, SIZE, SIZE, dtype=dtype)], [target, dict(target)]


def training_step(model: nn.Module, mode: Mode) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One step's losses and gradients; sampling of proposals is random, so it starts from a seed."""
    set_mode(model, mode)
    torch.manual_seed(1)
    losses = model(*batch(next(model.parameters()).dtype))
    model.zero_grad()
    sum(losses.values()).backward()
    return losses, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("faster_rcnn_mobilenet", "frozen"),
        pytest.param("retinanet", "batch_norm", marks=pytest.mark.slow),
        pytest.param("faster_rcnn", "batch_norm", marks=pytest.mark.slow),
        pytest.param("mask_rcnn", "frozen", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_equal_evals(name: str, norm: str) -> None:
    """In float64. In float32 a rounding can move a choice of proposals, and then the losses are others."""
    model = detector(name, norm).double()
    pairs = find_conv_bn_pairs(model)
    assert Counts.of(pairs) == COUNTS.get(name, Counts(53, 0))
    assert {type(model.get_submodule(pair.bn)).__name__ for pair in pairs} == {NORMS[norm].__name__}
    expected, expected_gradients = training_step(model, "eval")
    losses, gradients = training_step(model, "tune")
    assert losses.keys() == expected.keys()
    assert_close([*losses.values()], [*expected.values()], BACKWARD)
    assert_close(gradients, expected_gradients, 10 * BACKWARD)  # each by itself; the smallest are nearly zero


@pytest.mark.parametrize("name", SAVED)
def test_a_backbone_with_batch_norm_keeps_less(name: str) -> None:
    saved = 1 - _kept(name, "batch_norm", "tune") / _kept(name, "batch_norm", "eval")
    assert saved >= 0.2
    assert saved == pytest.approx(SAVED[name], abs=0.01)


def test_a_backbone_with_frozen_batch_norm_never_keeps_more() -> None:
    assert _kept("faster_rcnn", "frozen", "tune") <= _kept("faster_rcnn", "frozen", "eval")


def _kept(name: str, norm: str, mode: Mode) -> int:
    backbone = detector(name, norm).backbone
    return measure_memory(backbone, images(1, 3, SIZE, SIZE), mode=mode).saved_bytes
