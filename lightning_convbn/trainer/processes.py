"""Several processes: models whose forward communicates, and notes that are shared by all processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed
from torch import nn

from lightning_convbn.pairs.fsdp import is_fsdp_unit


def communicates(model: nn.Module) -> bool:
    """Whether the forward of a model communicates with other processes. Then all must run it equally often.

    FSDP gathers parameters. A SyncBatchNorm gathers statistics; a frozen one does not, and it has another class.
    """
    return any(is_fsdp_unit(module) or type(module) is nn.SyncBatchNorm for module in model.modules())


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
