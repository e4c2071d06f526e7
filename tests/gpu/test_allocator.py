"""Kept and peak bytes are what the allocator of the device counts.

On CUDA the allocator gives blocks: it rounds up to 512 bytes, and leaves less than 1 MiB at the end of a large block
unused. So what `measure_memory` counts is compared with the bytes that were asked for, and ``memory_allocated`` with
the blocks that these may take.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.allocator import Allocated, allocated_by
from helpers.networks import images, random_model
from helpers.smooth_network import smooth_net
from torch import Tensor, nn

from lightning_convbn import Mode, Recompute, measure_memory, set_mode
from lightning_convbn.memory import MIB, forward_and_backward, measure_memory_abstractly

CHOICES: list[tuple[Mode, Recompute]] = [("eval", "none"), ("tune", "none"), ("tune", "elementwise")]
NETWORKS = ["resnet18", "mobilenet_v3_small", "densenet121"]


def kept_by_the_graph(model: nn.Module, batch: Tensor) -> object:
    """Run a forward pass; nothing is alive then but the graph."""
    return model(batch.clone()).grad_fn


def peak_of(mode: Mode, recompute: Recompute, model: nn.Module, batch: Tensor) -> Allocated:
    set_mode(model, mode, recompute=recompute)
    return allocated_by(lambda: forward_and_backward(model, (batch,), {}), batch.device)


@pytest.mark.parametrize(("mode", "recompute"), CHOICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_count_is_the_allocators(device: torch.device, name: str, mode: Mode, recompute: Recompute) -> None:
    model, batch = random_model(name).to(device), images(2, 3, 64, 64).to(device)
    counted = measure_memory(model, batch, mode=mode, recompute=recompute).saved_bytes
    set_mode(model, mode, recompute=recompute)
    allocated = allocated_by(lambda: kept_by_the_graph(model, batch), device)
    assert counted == pytest.approx(allocated.kept, rel=0.02)
    # At most one large block and a few small ones for each module.
    modules = len(list(model.modules()))
    assert allocated.kept <= allocated.blocks <= allocated.kept + modules * (MIB + 8 * 512)


@pytest.mark.parametrize(("mode", "recompute"), CHOICES)
def test_the_count_without_data_is_that_with_data(device: torch.device, mode: Mode, recompute: Recompute) -> None:
    """So that what would not fit on a GPU can be counted for it."""
    model, batch = smooth_net(device), images(4, 3, 32, 32).to(device)
    real = measure_memory(model, batch, mode=mode, recompute=recompute)
    counts: list[int] = []

    def count() -> None:
        arguments: dict[str, Any] = {"mode": mode, "recompute": recompute, "allow_real_run": False}
        counts.append(measure_memory_abstractly(model, (batch,), {}, **arguments).saved_bytes)

    allocated = allocated_by(count, device)
    assert set(counts) == {real.saved_bytes}
    assert allocated.kept == 0
    assert allocated.most < real.saved_bytes / 10


@pytest.mark.parametrize(("mode", "recompute"), CHOICES)
def test_on_cuda_the_peak_is_the_allocators(device: torch.device, mode: Mode, recompute: Recompute) -> None:
    """Within what the two runs differ in: the model and its shadow, each with the same steps."""
    model, batch = random_model("mobilenet_v3_small").to(device), images(8, 3, 96, 96).to(device)
    use = measure_memory(model, batch, mode=mode, recompute=recompute)
    if device.type == "cpu":
        assert use.peak_allocated_bytes is None
        return
    found = peak_of(mode, recompute, model, batch)
    assert use.peak_allocated_bytes == pytest.approx(found.most_in_blocks, rel=0.02)
    assert found.most <= found.most_in_blocks


@pytest.mark.parametrize("name", NETWORKS[1:])
def test_the_peak_falls_from_mode_to_mode(device: torch.device, name: str) -> None:
    """By about what less is kept: at the peak most of it is alive."""
    model, batch = random_model(name).to(device), images(8, 3, 96, 96).to(device)
    peaks = [peak_of(mode, recompute, model, batch).most for mode, recompute in CHOICES]
    assert peaks[0] >= peaks[1] >= peaks[2], peaks
    kept = [measure_memory(model, batch, mode=m, recompute=r).saved_bytes for m, r in (CHOICES[0], CHOICES[-1])]
    assert peaks[0] - peaks[2] >= (kept[0] - kept[1]) / 2, (peaks, kept)


def test_nothing_is_allocated_after_a_step(device: torch.device) -> None:
    """Recipes, marks and holders let go of everything, with the graph."""
    model, batch = smooth_net(device), images(4, 3, 32, 32).to(device)
    for mode, recompute in CHOICES:
        assert peak_of(mode, recompute, model, batch).kept == 0
