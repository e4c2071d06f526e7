"""Measure the memory and the communication of DDP and FSDP in one training step, in Eval and in Tune mode.

    python examples/benchmarks/processes.py

writes `docs/benchmarks/processes.json`. Two processes communicate by gloo on the CPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from examples.benchmarks.allocator import allocations
from examples.benchmarks.networks import build
from examples.results_file import BENCHMARKS, write_json
from lightning_convbn import Mode, set_mode

MODEL, BATCH, PIXELS, PROCESSES = "resnet50", 2, 64, 2
MODES: tuple[Mode, ...] = ("eval", "tune")


def _sharded(model: nn.Module) -> nn.Module:
    for name in ("layer1", "layer2", "layer3", "layer4"):
        fully_shard(model.get_submodule(name))
    sharded: nn.Module = fully_shard(model)  # type: ignore[assignment]  # an FSDPModule is a Module, too
    return sharded


class _CollectiveCounter(TorchDispatchMode):
    """Counts the collective operations that are called while it is active, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "DDP": DistributedDataParallel,
    "DDP, gradient_as_bucket_view=True": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "FSDP2, a unit per stage": _sharded,
}


def main() -> None:
    """Start the processes, and write the measurements of the first one."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "rows")
        spawn(_measure, (folder, results), nprocs=PROCESSES)
        rows = torch.load(results)
    facts = {"model": MODEL, "batch": BATCH, "pixels": PIXELS, "processes": PROCESSES, "backend": "gloo"}
    path = write_json(BENCHMARKS / "processes.json", rows, ("torch", "torchvision"), **facts)
    print(f"wrote {path}")


def _measure(rank: int, folder: str, results: Path) -> None:
    os.environ["KINETO_LOG_LEVEL"] = "99"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    try:
        rows = [measure(wrapped, mode) for wrapped in WRAPPERS for mode in MODES]
        if rank == 0:
            torch.save(rows, results)
    finally:
        dist.destroy_process_group()


def measure(wrapped: str, mode: Mode) -> dict[str, Any]:
    """Measure one wrapper in one mode, in all processes at once."""
    model, _ = build(MODEL)
    size = sum(parameter.nbytes for parameter in model.parameters())
    set_mode(model, mode)
    images = torch.rand(BATCH, 3, PIXELS, PIXELS)
    held: list[nn.Module] = []

    def step() -> None:
        held.append(WRAPPERS[wrapped](model) if not held else held[0])
        held[0](images).mean().backward()

    bytes_held = sum(allocations(step))
    held[0].zero_grad()
    with _CollectiveCounter() as communication:
        step()
    return {
        "wrapped": wrapped,
        "mode": mode,
        "parameter_bytes": size,
        "held_bytes": bytes_held,
        "collectives": dict(communication.calls),
    }


if __name__ == "__main__":
    main()
