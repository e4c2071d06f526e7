"""Tune mode in a training loop of timm's parts: one `with` line around the loop."""

from typing import Any

from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_convbn import Mode, conv_bn_mode


def train(model: nn.Module, average: ModelEmaV3, data: Any, mode: Mode = "tune") -> list[float]:
    """Train a classifier and the moving average of its weights for one epoch; return the losses."""
    losses, optimizer = [], create_optimizer_v2(model, opt="sgd", lr=0.01)
    with conv_bn_mode(model.train(), mode):
        for images, labels in data:
            optimizer.zero_grad()
            (loss := cross_entropy(model(images), labels)).backward()
            optimizer.step()
            average.update(model)
            losses.append(loss.item())
    return losses
