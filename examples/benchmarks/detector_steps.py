"""Training steps of torchvision's detectors that read no values, so that they can be counted without data.

A detector looks at values: which anchors match a box, which proposals survive the suppression of others, which of them
are sampled. A step here has the same layers and losses, but as many samples as a training configuration allows.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import retinanet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, roi_align


def training_step(detector: nn.Module, half: bool = False) -> nn.Module:
    """Return a module that takes a batch of images of one size, and puts out the losses of a detector.

    Args:
        detector: A Faster R-CNN, Mask R-CNN or RetinaNet of torchvision. Its layers are shared.
        half: Whether it runs under autocast to float16, and the losses in float32.
    """
    return (RCNNStep if isinstance(detector, GeneralizedRCNN) else RetinaNetStep)(detector, half)


class RCNNStep(nn.Module):
    """A training step of Faster R-CNN, or of Mask R-CNN.

    The region proposal network has its losses on as many anchors as it samples at most, half of them on an object. So
    have the heads, on as many proposals as they sample at most, with the largest part of them on an object.

    Args:
        detector: The detector.
        half: As for `training_step`.
    """

    def __init__(self, detector: Any, half: bool) -> None:
        super().__init__()
        self.backbone, self.rpn_head = detector.backbone, detector.rpn.head
        heads = detector.roi_heads
        self.box_pool, self.box_head, self.box_predictor = heads.box_roi_pool, heads.box_head, heads.box_predictor
        self.mask_pool, self.mask_head, self.mask_predictor = heads.mask_roi_pool, heads.mask_head, heads.mask_predictor
        self.in_half = half
        self.anchors, self.anchors_on_objects = sampled(detector.rpn.fg_bg_sampler)
        self.proposals, self.proposals_on_objects = sampled(heads.fg_bg_sampler)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the losses of a batch of images."""
        count = len(images)
        with torch.autocast(images.device.type, torch.float16) if self.in_half else nullcontext():
            features = self.backbone(images)
            scores, deltas = concat_box_prediction_layers(*self.rpn_head([*features.values()]))
            losses = anchor_losses(scores, deltas, count * self.anchors, count * self.anchors_on_objects)
            pooled = pool(self.box_pool, features, count * self.proposals)
            classes, boxes = self.box_predictor(self.box_head(pooled))
            del pooled
            on_objects = count * self.proposals_on_objects
            losses += box_losses(classes, boxes, on_objects)
            if self.mask_head is not None:
                masks = self.mask_predictor(self.mask_head(pool(self.mask_pool, features, on_objects)))
                losses.append(mask_loss(masks))
        return losses


def sampled(sampler: Any) -> tuple[int, int]:
    """Return how many samples of an image there are at most, and how many of them on objects."""
    return sampler.batch_size_per_image, int(sampler.batch_size_per_image * sampler.positive_fraction)


def pool(pooler: MultiScaleRoIAlign, features: dict[str, Tensor], count: int) -> Tensor:
    """Pool boxes from the levels of a pyramid, as many from each. So `MultiScaleRoIAlign` does it, by their sizes."""
    levels = [features[name] for name in pooler.featmap_names]
    result = levels[0].new_zeros(count, levels[0].shape[1], *pooler.output_size)
    for chosen, level in zip(torch.arange(count).tensor_split(len(levels)), levels, strict=True):
        boxes = result.new_zeros(len(chosen), 5, dtype=torch.float32)  # the number of the image, and four corners
        pooled = roi_align(level, boxes, pooler.output_size, sampling_ratio=pooler.sampling_ratio)
        result[chosen] = pooled.to(result.dtype)
    return result


def anchor_losses(scores: Tensor, deltas: Tensor, count: int, on_objects: int) -> list[Tensor]:
    """Return the losses of the region proposal network, on sampled anchors."""
    chosen = torch.arange(count)
    found = scores.flatten()[chosen].float()
    moved = deltas[chosen[:on_objects]].float()
    return [
        F.smooth_l1_loss(moved, torch.zeros_like(moved), reduction="sum"),
        F.binary_cross_entropy_with_logits(found, torch.zeros_like(found)),
    ]


def box_losses(classes: Tensor, boxes: Tensor, on_objects: int) -> list[Tensor]:
    """Return the losses of the head of Faster R-CNN. Of the boxes, those of one class count."""
    labels = torch.zeros(len(classes), dtype=torch.long)
    moved = boxes.reshape(len(classes), -1, 4)[torch.arange(on_objects), labels[:on_objects]].float()
    return [
        F.cross_entropy(classes.float(), labels),
        F.smooth_l1_loss(moved, torch.zeros_like(moved), reduction="sum"),
    ]


def mask_loss(masks: Tensor) -> Tensor:
    """Return the loss of the head of Mask R-CNN. Of the masks, those of one class count."""
    found = masks[torch.arange(len(masks)), torch.zeros(len(masks), dtype=torch.long)].float()
    return F.binary_cross_entropy_with_logits(found, torch.zeros_like(found))


class RetinaNetStep(nn.Module):
    """A training step of RetinaNet. All anchors are in its focal loss, a hundred of each image are on an object.

    Args:
        detector: The detector.
        half: As for `training_step`.
    """

    ON_OBJECTS = 100

    def __init__(self, detector: retinanet.RetinaNet, half: bool) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head
        self.in_half = half

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the losses of a batch of images."""
        with torch.autocast(images.device.type, torch.float16) if self.in_half else nullcontext():
            outputs = self.head([*self.backbone(images).values()])
            return [*map(focal_loss, outputs["cls_logits"]), *map(self._box_loss, outputs["bbox_regression"])]

    def _box_loss(self, deltas: Tensor) -> Tensor:
        moved = deltas[torch.arange(self.ON_OBJECTS)].float()
        return F.l1_loss(moved, torch.zeros_like(moved), reduction="sum")


def focal_loss(logits: Tensor) -> Tensor:
    """Return the focal loss of one image, for all anchors."""
    chosen = logits[torch.arange(len(logits))].float()
    return OneKernel.apply(chosen).sum()


class OneKernel(torch.autograd.Function):
    """Allocates as a focal loss in one kernel does, such as MMDetection's. Its values say nothing.

    Such a kernel keeps its input, and allocates one value for each, and one gradient for each.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        """Allocate a loss for each value."""
        ctx.save_for_backward(logits)
        return torch.zeros_like(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Allocate a gradient for each value."""
        (logits,) = ctx.saved_tensors
        return torch.zeros_like(logits)
