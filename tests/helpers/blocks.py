"""Networks of repeated blocks, and how often their modules run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from helpers.networks import images, randomized
from helpers.tiny_training import conv_bn, pretend_trained
from lightning_convbn import set_mode


class Residual(nn.Module):
    """Two pairs and a sum, with something else in between."""

    def __init__(self, channels: int = 6, between: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.between = between()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.bn2(self.conv2(self.between(self.bn1(self.conv1(input)))))


class ResidualBackbone(nn.Module):
    """A stem and four blocks, which keep much more than they have parameters; 8 features per image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.body = nn.Sequential(*(Residual(8, nn.SiLU) for _ in range(4)))
        pretend_trained(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.stem(images)).mean((2, 3))  # type: ignore[no-any-return]


class Tower(nn.Module):
    """A stem, a row of blocks of one class, and a head."""

    def __init__(self, make_block: Callable[[], nn.Module] = Residual, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Hardswish())
        self.blocks = nn.ModuleList(make_block() for _ in range(blocks))
        self.head = nn.Linear(6, 4)
        randomized(self)

    def forward(self, input: Tensor) -> Tensor:
        output = self.stem(input)
        for block in self.blocks:
            output = self.run(block, output)
        return self.head(output.mean((2, 3)))  # type: ignore[no-any-return]

    def run(self, block: nn.Module, input: Tensor) -> Tensor:
        return block(input)  # type: ignore[no-any-return]


def batch() -> Tensor:
    return images(2, 3, 8, 8)


def count_calls(module: nn.Module) -> list[Any]:
    """Note each call of a module in a list. Its hook sees recomputations, too."""
    calls: list[Any] = []
    module.register_forward_hook(lambda module, args, output: calls.append(torch.is_grad_enabled()))
    return calls


def step_results(model: nn.Module, recompute: Any, mode: Any = "tune", *, seed: int = 0) -> list[Tensor]:
    """Output, gradients, buffers and the random state after a step, in a mode with recomputation."""
    set_mode(model, mode, recompute=recompute)
    model.zero_grad()
    torch.manual_seed(seed)
    input = batch().requires_grad_()
    output = model(input)
    (output * images(*output.shape, seed=2)).sum().backward()
    gradients = [leaf.grad for leaf in (input, *model.parameters()) if leaf.grad is not None]
    return [output.detach(), *gradients, *(buffer.clone() for buffer in model.buffers()), torch.get_rng_state()]
