"""Networks for tests, small ones and torchvision's, with statistics that are not the initial ones; images for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# The smallest member of each torchvision classifier family that has BatchNorms -> the smallest image that suits it.
FAMILIES = {
    "vgg11_bn": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "densenet121": 64,
    "inception_v3": 96,
    "googlenet": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_y_400mf": 64,
    "regnet_x_400mf": 64,
}


def torchvision_model(name: str) -> nn.Module:
    """Build a classifier in its eval state on the meta device, so that nothing is allocated or drawn."""
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # a RegNet computes its widths with tensors
        model = torchvision.models.get_model(name, num_classes=10, **options)
        if name.startswith("vgg"):  # its hidden layers would take half a gigabyte and hold no BatchNorm
            model.classifier = nn.Linear(512 * 7 * 7, 10)
    return model.to("meta").eval()


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm of a model statistics and an affine map that training might leave behind."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.5, generator=generator)
    return model


def random_model(name: str) -> nn.Module:
    """Build a classifier with weights as small as torchvision's: larger ones make so deep a model amplify rounding."""
    model = torchvision_model(name).to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
    return randomized(model)


def small_net(seed: int = 0) -> nn.Module:
    """Three folded pairs, one BatchNorm behind an activation, and a linear classifier; takes ``(N, 3, 8, 8)``."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.BatchNorm2d(6, affine=False),
        nn.SiLU(),
        nn.Conv2d(6, 8, 2, stride=2),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return randomized(net, seed)


class Net(nn.Module):
    """A model whose forward is a function of itself and the input, so that a test can say it in a line."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, input: Any) -> Any:
        return self.run(self, input)


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Draw standard normal values from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
