"""What several processes add: modules whose forward communicates, parameters that are gathered part by part."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed
from torch import nn

# Class names along the MRO instead of classes: importing them takes long, and a model that has them has imported them.
_FSDP = {"FSDPModule", "FullyShardedDataParallel"}


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether FSDP gathers the parameters of a module, those of units within excepted, for its forward."""
    return any(cls.__name__ in _FSDP for cls in type(module).__mro__)


def fsdp_unit(model: nn.Module, name: str) -> str | None:
    """Return the qualified name of the innermost FSDP unit that a module is or lies in; None if in none of the model's.

    Args:
        model: The model.
        name: Qualified name of the module within it.
    """
    while True:
        if is_fsdp_unit(model.get_submodule(name)):
            return name
        if not name:
            return None
        name = name.rpartition(".")[0]


def communicates(model: nn.Module) -> bool:
    """Whether processes must run the forward of a model equally often: it gathers parameters or statistics.

    A SyncBatchNorm that is frozen gathers none, and has another class.
    """
    return any(is_fsdp_unit(module) or type(module) is nn.SyncBatchNorm for module in model.modules())


def merged_over_processes(notes: Mapping[str, str], processes: int) -> dict[str, str]:
    """Return what any process has noted, the same in all of them; each has to call it.

    Args:
        notes: What this process has noted.
        processes: How many take part: one by itself may well run in a larger job.
    """
    if processes == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(notes)
    gathered: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, dict(notes))
    return {name: note for other in reversed(gathered) for name, note in other.items()}
