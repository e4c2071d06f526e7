"""A LightningModule that does not know of the package, for scripts that run in a process of their own."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class Module(LightningModule):
    """One convolution and its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.5))
        self.backbone[1].running_mean.fill_(1.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.backbone(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Tensor:
        return torch.randn(2, 1, 3, 8, 8)
