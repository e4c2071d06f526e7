"""LightningModules whose forward takes other things than one batch of images, for tests of the command."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from helpers.tiny_training import conv_bn


def write_checkpoint(module: LightningModule) -> list[str]:
    """Write a checkpoint of a module of this file, and return the arguments of the command that name it."""
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.5.0", "epoch": 0}
    torch.save(checkpoint, "last.ckpt")
    return ["last.ckpt", "--class", f"helpers.other_inputs:{type(module).__name__}"]


class TwoImages(LightningModule):
    """Takes an image and its depth, and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.color, self.depth = conv_bn(3, 4), conv_bn(1, 4)

    def forward(self, image: Tensor, depth: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        features = self.color(image) + self.depth(depth)
        return {"features": features if scale is None else features * scale[:, None, None, None]}


class OneDict(LightningModule):
    """Takes a dict of images and masks, and gives a list."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(3, 4)

    def forward(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return [self.block(batch["image"]) * batch["mask"], batch["mask"]]


class OneList(LightningModule):
    """Takes a list of images without a batch, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(3, 4)

    def forward(self, images: list[Tensor]) -> Tensor:
        assert isinstance(images, list)
        return self.block(torch.stack(images))


class Unbatched(LightningModule):
    """Takes one row of 3 values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, row: Tensor) -> Tensor:
        return self.bn(self.linear(row[None]))[0]


class Captioned(LightningModule):
    """Takes images and, by name only, the words below them. It can't run without data."""

    words: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.embedding = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(10, 4)
        self.words = []

    def forward(self, image: Tensor, *, mode: Tensor) -> Tensor:
        """Add the mean word to each channel. The argument is called as an option of `measure_memory`."""
        if mode.max() >= 0:
            self.words.append(mode)
        return self.bn(self.conv(image)) + self.embedding(mode).mean(1)[:, :, None, None]


class WithExample(TwoImages):
    """`TwoImages` with an example, which `example` chooses."""

    example: Any = {"image": torch.ones(2, 3, 8, 8), "depth": torch.ones(2, 1, 8, 8, dtype=torch.float64)}

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = self.example
