"""Counts the bytes of a training step: what a forward pass keeps for the backward pass, and the peak of the step.

- `measure.py`: `measure_memory` runs a model, `measure_memory_abstractly` runs it on tensors without data.
- `step.py`: runs one step, and says what was kept and what was alive at once.
- `live_storages.py`: notes when each storage is allocated and when it is gone.
- `optimizers.py`: what an optimizer needs beside the step.
- `use.py`: `MemoryUse`, the result.
- `plan.py`: the least recomputation whose step fits into a budget. `fit_budget.py`: `fit_memory_budget` takes it.
- `budget.py`: an amount of memory, and what a device has. `largest_batch.py`: the largest batch for it.
"""

from lightning_convbn.memory.live_storages import INPUT
from lightning_convbn.memory.measure import forward_and_backward, measure_memory, measure_memory_abstractly
from lightning_convbn.memory.optimizers import OPTIMIZERS, Optimizer
from lightning_convbn.memory.step import count_saved_bytes, saved_bytes_by_module
from lightning_convbn.memory.use import MIB, MemoryUse, as_mib

__all__ = [
    "INPUT",
    "MIB",
    "OPTIMIZERS",
    "MemoryUse",
    "Optimizer",
    "as_mib",
    "count_saved_bytes",
    "forward_and_backward",
    "measure_memory",
    "measure_memory_abstractly",
    "saved_bytes_by_module",
]
