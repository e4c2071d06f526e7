"""Several processes: notes that are shared by all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed


def merged_over_processes(notes: Mapping[str, str], processes: int) -> dict[str, str]:
    """Return the notes of all processes, the same in each of them. Each process must call it.

    Args:
        notes: What this process has noted.
        processes: How many processes the Trainer has. With one there is nothing to merge, even within a larger job.
    """
    if processes == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(notes)
    gathered: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, dict(notes))
    return {name: note for other in reversed(gathered) for name, note in other.items()}
