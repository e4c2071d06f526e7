"""The callback's argument ``memory_budget``: what training recomputes, so that its steps fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_convbn.compat import compiled_by_lightning
from lightning_convbn.memory.budget import bytes_on, check_budget_holds, checked_budget, fixed_bytes
from lightning_convbn.memory.live_storages import tensors_in
from lightning_convbn.memory.optimizers import bytes_of_optimizers
from lightning_convbn.memory.plan import CantCountError, Choice, MemoryPlan, StepPlanner
from lightning_convbn.pairs.units import innermost_unit, is_compiled_unit, is_fsdp_unit
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.lightning_api import LightningModule, Trainer, rank_zero_warn
from lightning_convbn.trainer.logged_metrics import log_plan
from lightning_convbn.trainer.processes import gathered
from lightning_convbn.trainer.report import print_lines

_UNITS = {
    is_compiled_unit: "is compiled: there the compiler decides what is kept; leave out memory_budget, or torch.compile",
    is_fsdp_unit: "is sharded by FSDP; leave memory_budget out, and set recompute=...",
}


class _Size(NamedTuple):
    """How large a step is: the bytes of the inputs, and of the parameters that want a gradient."""

    inputs: int
    trained: int


class PlannedRecomputation:
    """Plans what the one part of a LightningModule recomputes: before its first forward, and before larger steps.

    What is planned for is a step of the part, with the gradients of all parameters, the optimizers of the Trainer, and
    the parameters and buffers of the LightningModule. What other modules compute is not in it.

    Args:
        memory_budget: As for the callback.
        trainer: The Trainer.
        pl_module: The LightningModule. It is on its device.

    Raises:
        ValueError: If the budget is ``"auto"`` and there is no CUDA device, or if it can't hold parameters and buffers.
    """

    def __init__(self, memory_budget: int | str, trainer: Trainer, pl_module: LightningModule) -> None:
        self._budget = checked_budget(memory_budget)
        self._trainer = trainer
        self._pl_module = pl_module
        self._plans: dict[_Size, MemoryPlan | None] = {}  # None if none could be made
        self._planned_for = _Size(-1, -1)  # what the plan in force is for
        self._remove_hook: Callable[[], None] | None = None
        check_budget_holds(self._bytes(()), pl_module)

    def check(self, parts: Sequence[ConvertedPart]) -> None:
        """Check that there is one part, and that what it keeps is decided here.

        Raises:
            ValueError: If there are several parts, or if the part is compiled or sharded.
        """
        if len(parts) != 1:
            names = ", ".join(f"`{part.path}`" for part in parts)
            raise ValueError(
                f"memory_budget plans for one part, and {len(parts)} are converted: {names}; set target=... to one "
                "module that holds them"
            )
        (part,) = parts
        if compiled_by_lightning(self._pl_module):
            raise ValueError(f"memory_budget can't plan for what {_UNITS[is_compiled_unit]}")
        for is_unit, why_not in _UNITS.items():
            around = innermost_unit(self._pl_module, part.path, is_unit)
            if around is not None or any(map(is_unit, part.module.modules())):
                raise ValueError(f"memory_budget can't plan for what {why_not}")

    def watch(self, parts: Sequence[ConvertedPart]) -> None:
        """Plan before the forwards of the part that trains. It raises what `check` raises."""
        self.check(parts)
        self.unwatch()
        self._remove_hook = parts[0].call_before_forwards(partial(self._follow, parts[0]))

    def unwatch(self) -> None:
        """Plan no more. The plan stays in force."""
        if self._remove_hook is not None:
            self._remove_hook()
            self._remove_hook = None

    def forget(self) -> None:
        """Plan anew before the next forward: modules were changed, or a batch that was tried is not used."""
        self._plans.clear()
        self._planned_for = _Size(-1, -1)

    def merge(self, part: ConvertedPart, processes: int) -> None:
        """Recompute what the process recomputes that must recompute most. Every process must call this.

        Args:
            part: The part.
            processes: How many processes the Trainer has.
        """
        most = max(gathered(part.recompute, processes), key=_amount)
        if _amount(most) > _amount(part.recompute):
            part.recompute_from_now_on(most)

    def _follow(self, part: ConvertedPart, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan if this forward has larger inputs than those before, or if more is trained. It has not begun yet."""
        size = _Size(
            sum(tensor.nbytes for tensor in tensors_in((inputs, kwargs))),
            sum(parameter.nbytes for parameter in self._pl_module.parameters() if parameter.requires_grad),
        )
        smaller = size.inputs <= self._planned_for.inputs and size.trained <= self._planned_for.trained
        if smaller or not torch.is_grad_enabled():
            return
        self._planned_for = size
        if size not in self._plans:
            self._plans[size] = self._plan(part, inputs, kwargs)
        plan = self._plans[size]
        recompute: Choice = "blocks" if plan is None else plan.recompute
        if recompute != part.recompute:
            part.recompute_from_now_on(recompute)

    def _plan(self, part: ConvertedPart, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MemoryPlan | None:
        """Make a plan, and say it."""
        planner = partial(StepPlanner, part.module, inputs, kwargs, mode=part.mode, pairs=part.pairs)
        optimizer = bytes_of_optimizers(self._trainer.optimizers)
        try:
            plan = planner(optimizer=optimizer, elsewhere=self._elsewhere(part)).plan(self._bytes((inputs, kwargs)))
        except CantCountError as error:
            rank_zero_warn(
                f"ConvBN: memory_budget: `{part.path}` can't be planned for, because {error}. All of its blocks run "
                "again in the backward pass"
            )
            return None
        print_lines(self._trainer, [f"ConvBN: `{part.path}`: {plan}"])
        log_plan(self._trainer, plan.peak_bytes)
        if not plan.fits:
            rank_zero_warn(f"ConvBN: {plan.complaint()}")
        return plan

    def _elsewhere(self, part: ConvertedPart) -> int:
        """Return the bytes that a step needs beside the step of the part, and beside the optimizers.

        A gradient is there twice if gradients are accumulated, and if DDP has its buckets.
        """
        inside = set(part.module.parameters())
        trained = [parameter for parameter in self._pl_module.parameters() if parameter.requires_grad]
        others = sum(parameter.nbytes for parameter in trained if parameter not in inside)
        twice = (self._trainer.accumulate_grad_batches > 1) + (self._trainer.world_size > 1)
        return fixed_bytes(self._pl_module) + others + twice * sum(parameter.nbytes for parameter in trained)

    def _bytes(self, inputs: Any) -> int:
        """Return the budget in bytes. A plan counts what the step holds already on the device."""
        device = self._pl_module.device
        held = [*_held_by(self._pl_module, self._trainer.optimizers), *tensors_in(inputs)]
        return bytes_on(device, self._budget, sum(tensor.nbytes for tensor in held if tensor.device == device))


def _held_by(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    states = [tensor for optimizer in optimizers for tensor in tensors_in(dict(optimizer.state))]
    return [*module.parameters(), *module.buffers(), *gradients, *states]


def _amount(recompute: str | Sequence[str]) -> float:
    """Return how much is recomputed, as a number to compare: all blocks, some, elementwise, nothing."""
    return {"none": -2, "elementwise": -1, "blocks": inf}[recompute] if isinstance(recompute, str) else len(recompute)
