"""An amount of memory that a step may take: how it is written, and what a device has left."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_convbn.memory.use import as_mib
from lightning_convbn.pairs.side_effects import tensors_of

_BINARY = {prefix: 2 ** (10 * power) for power, prefix in enumerate("KMGT", start=1)}
UNITS = {
    **{f"{prefix}{end}": size for prefix, size in _BINARY.items() for end in ("", "I", "IB")},  # 8G, 8Gi and 8GiB
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate(_BINARY, start=1)},  # 8GB
}
AUTO = "auto"
MARGIN = 0.1  # of what a device has: workspaces of kernels, and what the allocator rounds up

Budget = int | Literal["auto"]


def size_in_bytes(amount: str) -> int:
    """Return the number of bytes of an amount of memory: of 8GiB, 8G and 8Gi 2**33, and of 8GB 8 * 10**9.

    Raises:
        ValueError: If it is none. The text begins with the value, so write the argument before it.

    Example:
        >>> size_in_bytes("8GiB")
        8589934592
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]+)", amount.strip().upper())
    size = int(float(match[1]) * UNITS.get(match[2], 0)) if match is not None else 0
    if not size:
        raise ValueError(f"{amount!r} is no amount of memory, as 8GiB, 500MiB or 24GB")
    return size


def checked_budget(memory_budget: object) -> Budget:
    """Return the argument ``memory_budget`` in bytes, or ``"auto"``.

    Raises:
        ValueError: If it is neither a number of bytes, nor a text such as ``"8GiB"``, nor ``"auto"``.
    """
    if memory_budget == AUTO:
        return "auto"
    if isinstance(memory_budget, str):
        try:
            return size_in_bytes(memory_budget)
        except ValueError as error:
            raise ValueError(f"memory_budget={error}, nor 'auto'") from None
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 1:
        raise ValueError(
            f"memory_budget={memory_budget!r} is no whole number of bytes; give one, or a text such as '8GiB'"
        )
    return memory_budget


def bytes_on(device: torch.device, budget: Budget, held: Iterable[Tensor]) -> int:
    """Return a budget in bytes. ``"auto"`` is what a CUDA device has left for this process, less a tenth.

    If ``torch.cuda.set_per_process_memory_fraction`` limits the process, the limit counts.

    Args:
        device: The device of the model.
        budget: As `checked_budget` returns it.
        held: Tensors that a plan counts, and that are allocated already.

    Raises:
        ValueError: If it is ``"auto"``, and the device is no CUDA device.
    """
    if isinstance(budget, int):
        return budget
    if device.type != "cuda":
        raise ValueError(
            f"memory_budget='auto' needs a CUDA device, and the model is on {device.type!r}; give an amount, as '8GiB'"
        )
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    others = torch.cuda.memory_allocated(device) - sum(tensor.nbytes for tensor in held if tensor.device == device)
    return int((1 - MARGIN) * (min(free + torch.cuda.memory_reserved(device), allowed) - max(others, 0)))


def tensors_held(model: nn.Module, inputs: Any) -> list[Tensor]:
    """List what a step needs and is there before it: parameters, buffers, gradients, inputs."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*model.parameters(), *model.buffers(), *gradients, *tensors_of(inputs)]


def fixed_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def check_budget_holds(budget: int, model: nn.Module) -> None:
    """Raise a ValueError if a budget is less than parameters and buffers."""
    if budget <= fixed_bytes(model):
        raise ValueError(
            f"memory_budget: {as_mib(budget)} can't hold the parameters and buffers of {type(model).__name__}; give "
            f"more than {as_mib(fixed_bytes(model))}"
        )
