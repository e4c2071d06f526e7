"""What an optimizer needs in memory: its state, and what its step allocates for a moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Optimizer = Literal["none", "sgd", "adamw"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)

_BUFFERS = {"none": 0, "sgd": 1, "adamw": 2}  # for each parameter: none, momentum, exp_avg and exp_avg_sq
_STEP_COUNTER = 4  # AdamW has one float32 for each parameter


class OptimizerBytes(NamedTuple):
    """Bytes of an optimizer.

    Attributes:
        state: What it holds from one step to the next.
        temporary: The most that its step allocates at once beside that.
    """

    state: int
    temporary: int


def check_optimizer(optimizer: str) -> None:
    """Raise a ValueError if this is not a known optimizer."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is unknown; it must be one of {', '.join(map(repr, OPTIMIZERS))}")


def optimizer_bytes(parameters: Sequence[Tensor], optimizer: Optimizer) -> OptimizerBytes:
    """Return the bytes of ``torch.optim.SGD`` with momentum, or of ``torch.optim.AdamW``, as they are by default.

    AdamW computes a denominator. On the CPU it goes from parameter to parameter and has two tensors of the size of one
    at once. On other devices it handles all parameters at once (``foreach``) and has one tensor for each of them.

    Args:
        parameters: The parameters that want a gradient. Each has its own shape, dtype and device.
        optimizer: ``"none"``, ``"sgd"`` or ``"adamw"``.
    """
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    state = _BUFFERS[optimizer] * sum(sizes)
    if optimizer != "adamw":
        return OptimizerBytes(state, 0)
    on_cpu = [size for size, parameter in zip(sizes, parameters, strict=True) if parameter.device.type == "cpu"]
    temporary = max(2 * max(on_cpu, default=0), sum(sizes) - sum(on_cpu))
    return OptimizerBytes(state + _STEP_COUNTER * len(sizes), temporary)
