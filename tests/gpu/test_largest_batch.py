"""The batch that the counts call the largest one fits on a card of that size, and a larger one does not.

A card of any size is had by a limit for the process. Where there is none, on a CPU, the allocator is asked.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.allocator import allocated_by, limited_to
from helpers.networks import images, random_model
from torch import nn

from lightning_convbn import Mode, Recompute, set_mode
from lightning_convbn.memory import MIB, forward_and_backward, measure_memory_abstractly
from lightning_convbn.memory.largest_batch import largest_batch

CHOICES: list[tuple[Mode, Recompute]] = [("eval", "none"), ("tune", "none"), ("tune", "elementwise")]
ROOM = {"cpu": 128 * MIB, "cuda": 1024 * MIB}
PIXELS = 64
MARGIN = 1.05  # workspaces, and blocks that are larger than what was asked for
LARGER = 1.15


@pytest.mark.parametrize(("mode", "recompute"), CHOICES)
def test_the_largest_batch_fits_and_a_larger_one_does_not(
    device: torch.device, mode: Mode, recompute: Recompute
) -> None:
    model, room = random_model("mobilenet_v2").to(device), ROOM[device.type]

    def needed(batch: int) -> int:
        inputs = (torch.empty(batch, 3, PIXELS, PIXELS, device=device),)
        peak = measure_memory_abstractly(model, inputs, {}, mode=mode, recompute=recompute).peak_bytes
        assert peak is not None
        return peak

    largest = largest_batch(needed, room)
    assert largest is not None
    set_mode(model, mode, recompute=recompute)
    step_fits(model, 1, device, room)  # libraries allocate their workspaces, which stay
    assert step_fits(model, largest, device, room)
    assert not step_fits(model, math.ceil(LARGER * largest), device, room)


def step_fits(model: nn.Module, batch: int, device: torch.device, room: int) -> bool:
    """Make a step with as much memory as there is room beside what is allocated, and a margin."""

    def step() -> None:
        forward_and_backward(model, (images(batch, 3, PIXELS, PIXELS).to(device, copy=True),), {})

    if device.type == "cpu":
        return allocated_by(step, device).most <= MARGIN * room
    try:
        with limited_to(int(MARGIN * room), device):
            step()
    except torch.OutOfMemoryError:
        return False
    return True
