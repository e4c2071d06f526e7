"""Asks the CPU allocator what it gave and took back, by the events that PyTorch's profiler notes."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

KERNELS = ("aten::convolution", "aten::convolution_backward", "aten::native_batch_norm_backward")


def allocations(function: Callable[[], Any]) -> list[int]:
    """Run a function; return the sizes that the CPU allocator gave (above 0) and took back (below 0), in order."""
    gc.collect()  # so that nothing is freed during the function that was allocated before it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
        gc.collect()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_by_allocator(step: Callable[[], object], *, count_workspaces: bool = True) -> int:
    """Ask the allocator for the most bytes that were alive at once, of those that the step has allocated itself.

    Args:
        step: It returns what it leaves behind.
        count_workspaces: Whether to count what the kernel of a convolution or a BatchNorm has both allocated and freed.
            On a CPU oneDNN copies images into a layout of its own.
    """
    gc.collect()
    result = None  # nothing may be freed within that was allocated before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    del result
    found: list[tuple[int, int, int, int]] = []  # time, address, size, number of the kernel
    for root in profiler.profiler.kineto_results.experimental_event_tree():
        _list_allocations(root, 0, found)
    born: dict[int, tuple[int, int]] = {}
    changes: list[int] = []
    for _, address, size, kernel in sorted(found):
        if size > 0:
            born[address] = len(changes), kernel
        elif address not in born:  # the profiler itself has allocated it
            continue
        else:
            index, by = born.pop(address)
            if by == kernel and kernel and not count_workspaces:
                changes[index] = size = 0
        changes.append(size)
    return max(itertools.accumulate(changes))


def _list_allocations(event: Any, kernel: int, found: list[tuple[int, int, int, int]]) -> None:
    if event.tag == _EventType.Allocation:
        found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, kernel))
    for child in event.children:
        _list_allocations(child, kernel or (event.id if event.name in KERNELS else 0), found)
