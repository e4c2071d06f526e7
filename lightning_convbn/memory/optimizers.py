"""What an optimizer needs in memory: its state, and what its step allocates for a moment.

No formula knows that: the optimizer itself takes two steps, on tensors without data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_convbn.compat import fake_tensor_mode, tree_map_only, without_modes
from lightning_convbn.memory.live_storages import StorageLedger
from lightning_convbn.pairs.side_effects import tensors_of

Optimizer = Literal["none", "sgd", "adamw"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)

_Layout = tuple[torch.Size, torch.dtype, torch.device]


class OptimizerBytes(NamedTuple):
    """Bytes of an optimizer.

    Attributes:
        state: What it holds from one step to the next.
        temporary: The most that its step allocates at once beside that.
    """

    state: int
    temporary: int


def check_optimizer(optimizer: Optimizer | OptimizerBytes) -> None:
    """Raise a ValueError if this is neither the name of a known optimizer nor what one needs."""
    if not isinstance(optimizer, OptimizerBytes) and optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is unknown; it must be one of {', '.join(map(repr, OPTIMIZERS))}")


def optimizer_bytes(parameters: Sequence[Tensor], optimizer: Optimizer | OptimizerBytes) -> OptimizerBytes:
    """Return what ``torch.optim.SGD`` with momentum needs, or ``torch.optim.AdamW``, as they are by default.

    Args:
        parameters: The parameters that want a gradient. Each has its own shape, dtype and device.
        optimizer: ``"none"``, ``"sgd"`` or ``"adamw"``; or what is known already.
    """
    if isinstance(optimizer, OptimizerBytes):
        return optimizer
    return _named(tuple(map(_layout, parameters)), optimizer)


def bytes_of_optimizers(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[OptimizerBytes, list[str]]:
    """Return what optimizers need together, in later steps, and the names of the classes that could not be counted.

    They step one after the other. They are not changed. One that can't step without data, or that its class can't make
    again, counts as an AdamW.
    """
    state = temporary = 0
    unknown = []
    for optimizer in optimizers:
        held = sum(tensor.nbytes for tensor in tensors_of([*optimizer.state.values()]))
        try:
            needs = _two_steps(_maker(optimizer))
        except Exception:  # a user's class may ask for other arguments, or look at values
            unknown.append(type(optimizer).__name__)
            trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
            needs = optimizer_bytes([parameter for parameter in trained if parameter.requires_grad], "adamw")
        state, temporary = state + max(needs.state, held), max(temporary, needs.temporary)
    return OptimizerBytes(state, temporary), unknown


def _maker(optimizer: torch.optim.Optimizer) -> Callable[[], torch.optim.Optimizer]:
    """Return what makes an optimizer like another one, of parameters without data.

    A learning rate in a tensor becomes a number now, while tensors have data.
    """
    known = inspect.signature(type(optimizer)).parameters
    options = {name: _number(value) for name, value in optimizer.defaults.items() if name in known}
    groups = [
        {name: _number(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]

    def again() -> torch.optim.Optimizer:
        twins = [[_twin(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        described = [{"params": params, **group} for params, group in zip(twins, groups, strict=True)]
        return type(optimizer)(described, **options)

    return again


def _number(option: Any) -> Any:
    return tree_map_only(Tensor, Tensor.item, option)


def _twin(parameter: Tensor) -> nn.Parameter:
    return _without_data(_layout(parameter), parameter.requires_grad)


@cache
def _named(layouts: tuple[_Layout, ...], optimizer: Optimizer) -> OptimizerBytes:
    if optimizer == "none" or not layouts:
        return OptimizerBytes(0, 0)

    def again() -> torch.optim.Optimizer:
        twins = [_without_data(layout) for layout in layouts]
        return torch.optim.AdamW(twins) if optimizer == "adamw" else torch.optim.SGD(twins, lr=0.1, momentum=0.9)

    return _two_steps(again)


def _two_steps(again: Callable[[], torch.optim.Optimizer]) -> OptimizerBytes:
    """Take two steps of an optimizer on tensors without data: one that makes its state, and one to count.

    Args:
        again: Makes the optimizer.
    """
    with without_modes(), fake_tensor_mode():
        optimizer = again()
        for group in optimizer.param_groups:
            on_cpu = any(parameter.device.type == "cpu" for parameter in group["params"])
            if group.get("foreach", False) is None and not group.get("fused") and not on_cpu:
                group["foreach"] = True  # PyTorch's default on a device, but not for tensors without data
        first, second = StorageLedger(optimizer.step), StorageLedger(optimizer.step)
        with torch.no_grad():
            with first:
                optimizer.step()
            state = sum(first.bytes_alive().values())
            with second:
                optimizer.step()
    return OptimizerBytes(state, second.peak)


def _layout(tensor: Tensor) -> _Layout:
    return tensor.shape, tensor.dtype, tensor.device


def _without_data(layout: _Layout, wants_gradient: bool = True) -> nn.Parameter:
    """Return a parameter without data, that has its gradient if it wants one."""
    shape, dtype, device = layout
    twin = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), wants_gradient)
    twin.grad = torch.empty_like(twin) if wants_gradient else None
    return twin
