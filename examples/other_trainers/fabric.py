"""Tune mode in Lightning Fabric: one `with` line around the loop."""

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_convbn import Mode, conv_bn_mode


def train(fabric: Fabric, network: nn.Module, data: Any, mode: Mode = "tune") -> list[float]:
    """Train a classifier for one epoch; return the losses. Afterwards the network has its plain modules again."""
    losses = []
    with conv_bn_mode(network, mode):
        model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.01))
        for images, labels in fabric.setup_dataloaders(data):
            optimizer.zero_grad()
            fabric.backward(loss := cross_entropy(model(images), labels))
            optimizer.step()
            losses.append(loss.item())
    return losses
