"""One bit for each value and one byte for each window: what is unpacked is what was packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import images
from helpers.recomputation import IMAGE, PAIR, Apply, assert_recomputed_alike, batch, net
from torch import Tensor, nn

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2)},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 2, "dilation": 2, "stride": 1},
    {"kernel_size": (2, 3), "dilation": (3, 1), "padding": (1, 1), "stride": (3, 2), "ceil_mode": True},
    {"kernel_size": [3], "stride": [2]},
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_relu_in_front_of_a_max_pool(geometry: dict[str, Any], channels_last: bool) -> None:
    """It keeps one bit for each value, and the pool one byte for each window."""
    pooled = F.max_pool2d(torch.zeros(2, 6, 9, 11), **geometry).numel()
    input = images(2, 3, 9, 11)
    input = input.to(memory_format=torch.channels_last) if channels_last else input
    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        kept = assert_recomputed_alike(net(relu, nn.MaxPool2d(**geometry)), input)
        assert kept[1] == input.nbytes + PAIR + -(-2 * 6 * 9 * 11 // 8) + pooled


@pytest.mark.parametrize("geometry", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}])
def test_a_max_pool_of_volumes(geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(**geometry))
    input = images(2, 3, 5, 6, 7)
    pooled = F.max_pool3d(torch.zeros(2, 4, 5, 6, 7), **geometry).numel()
    kept = assert_recomputed_alike(model, input)
    assert kept[1] == input.nbytes + 2 * 4 * 4 + 2 * 4 * 5 * 6 * 7 // 8 + pooled


def test_a_window_that_a_byte_can_not_tell_keeps_its_indices() -> None:
    kept = assert_recomputed_alike(net(nn.ReLU(), nn.MaxPool2d(17, 1)), batch(size=20))
    assert kept[1] == 2 * 3 * 400 * 4 + PAIR + 2 * 6 * 400 // 8 + 2 * 6 * 16 * 8


def test_a_max_pool_that_returns_its_indices() -> None:
    def pool(input: Tensor) -> Tensor:
        output, indices = F.max_pool2d(F.relu(input), 2, return_indices=True)
        return F.max_unpool2d(output, indices, 2)

    assert_recomputed_alike(net(Apply(pool)))


def test_a_clipped_output_that_somebody_else_reads_after_it_was_packed() -> None:
    def branches(input: Tensor, last: nn.Module) -> Tensor:
        clipped = F.relu(input)
        pooled = F.max_pool2d(clipped, 2)
        return last(clipped) + pooled.sum()

    kept = assert_recomputed_alike(net(Apply(branches, nn.Conv2d(6, 4, 1))))
    assert kept[1] == IMAGE + PAIR + 2 * 6 * 64 * 4 + 2 * 6 * 16
