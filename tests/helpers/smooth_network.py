"""A network without kinks that has most of what the package folds and recomputes.

Where a rounding changes the sign of a ReLU's input, the gradient jumps, and its error says nothing of the fold. Here a
small change of a value is a small change of every gradient, so that errors can be bounded by the arithmetic alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.networks import randomized

DEPTH = 7  # layers with a sum of products, one behind the other
PRODUCTS = 16 * 9  # that such a layer adds up, at most


class SmoothNet(nn.Module):
    """Pairs of ordinary, grouped, depthwise and transposed convolutions, a gate, a concatenation, a lone BatchNorm.

    Takes ``(N, 3, S, S)`` with an even S, and puts out ``(N, 4)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False))
        self.grouped = _conv_bn(nn.Conv2d(16, 16, 3, padding=1, groups=2))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.lone = nn.BatchNorm2d(16)  # behind a product, so it is not folded
        self.depthwise = _conv_bn(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False))
        self.up = _conv_bn(nn.ConvTranspose2d(32, 8, 2, stride=2, bias=False))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, images: Tensor) -> Tensor:
        features = self.grouped(self.stem(images))
        gated = self.lone(features * self.gate(features))
        both = torch.cat([features, self.depthwise(nn.functional.silu(gated))], dim=1)
        output: Tensor = self.head(self.up(both).mean((2, 3)))
        return output


def smooth_net(device: torch.device, dtype: torch.dtype = torch.float32, *, channels_last: bool = False) -> SmoothNet:
    """Build it; it always has the same weights and statistics, and its BatchNorms are in eval state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = randomized(SmoothNet()).eval()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return net.to(device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload, return-value]


def _conv_bn(conv: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.SiLU())  # type: ignore[arg-type]
