"""What the allocator of a device says that a function has allocated: on the CPU by the profiler's memory events."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.benchmarks.allocator import allocations


class Allocated(NamedTuple):
    """Bytes beyond those that were allocated before.

    Attributes:
        kept: What is allocated still, while what the function has returned is alive.
        most: What was allocated at once, at most.
        blocks: On CUDA, ``memory_allocated`` in the place of ``kept``: the allocator gives whole blocks.
        most_in_blocks: On CUDA, ``max_memory_allocated`` in the place of ``most``.
    """

    kept: int
    most: int
    blocks: int
    most_in_blocks: int


def allocated_by(function: Callable[[], Any], device: torch.device) -> Allocated:
    """Run a function. On CUDA run it once before: libraries allocate their workspaces when they are first used."""
    if device.type != "cuda":
        alive: list[Any] = []
        levels = [0, *accumulate(allocations(lambda: alive.append(function())))]
        return Allocated(levels[-1], max(levels), levels[-1], max(levels))
    function()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    kept = function()
    gc.collect()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_stats(device)
    del kept
    keys = [f"{kind}_bytes.all.{which}" for kind in ("requested", "allocated") for which in ("current", "peak")]
    starts = [before[key.replace("peak", "current")] for key in keys]
    current, peak, blocks, most_in_blocks = (after[key] - start for key, start in zip(keys, starts, strict=True))
    return Allocated(current, peak, blocks, most_in_blocks)


def kept_by_allocator(model: nn.Module, batch: Tensor) -> int:
    """Ask for the bytes that one forward pass has allocated and not freed when only its graph is left."""
    return allocated_by(lambda: model(batch.clone()).grad_fn, batch.device).kept


@contextmanager
def limited_to(room: int, device: torch.device) -> Iterator[None]:
    """Let the process allocate so many bytes more on the current CUDA device."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + room) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
