"""Several processes: notes that are shared by all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch.distributed

T = TypeVar("T")


def merged_over_processes(notes: Mapping[str, str], processes: int) -> dict[str, str]:
    """Return the notes of all processes, the same in each of them. Each process must call it."""
    return {name: note for other in reversed(gathered(dict(notes), processes)) for name, note in other.items()}


def gathered(value: T, processes: int) -> list[T]:
    """Return the values of all processes, in the order of the processes. Each process must call it.

    Args:
        value: What this process has.
        processes: How many processes the Trainer has. With one there is nothing to gather, even within a larger job.
    """
    if processes == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
