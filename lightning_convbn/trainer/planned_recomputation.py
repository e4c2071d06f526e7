"""The callback's argument ``memory_budget``: what training recomputes, so that its steps fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from lightning_convbn.compat import compiled_by_lightning
from lightning_convbn.memory.budget import bytes_on, check_budget_holds, checked_budget, fixed_bytes, tensors_held
from lightning_convbn.memory.optimizers import bytes_of_optimizers
from lightning_convbn.memory.plan import CantCountError, Choice, MemoryPlan, StepPlanner, most_of
from lightning_convbn.memory.use import MIB
from lightning_convbn.pairs.side_effects import tensors_of
from lightning_convbn.pairs.units import innermost_unit, is_compiled_unit, is_fsdp_unit
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.lightning_api import LightningModule, Trainer, rank_zero_warn
from lightning_convbn.trainer.logged_metrics import log
from lightning_convbn.trainer.own_forward import before_forwards
from lightning_convbn.trainer.processes import gathered
from lightning_convbn.trainer.report import print_lines

_UNITS = {
    is_compiled_unit: "is compiled. There the compiler decides what is kept; leave out memory_budget, or torch.compile",
    is_fsdp_unit: "is sharded by FSDP. Leave memory_budget out, and set recompute=...",
}


class PlannedRecomputation:
    """Plans what the one part of a LightningModule recomputes: before its first forward, and before larger steps.

    What is planned for is a step of the part, with the gradients of all parameters, the optimizers of the Trainer, and
    the parameters and buffers of the LightningModule. What other modules compute is not in it.

    Within a batch more may be recomputed from one forward to the next, but never less: a backward pass may wait for a
    block to run again.

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
        self._parameters = [*pl_module.parameters()]
        self._plans: dict[Any, tuple[int, Choice]] = {}  # situation -> the largest inputs so far, what to recompute
        self._least: Choice = "none"  # as another process must
        self._in_batch = False  # whether the part has run in this batch
        self._hook = ExitStack()
        check_budget_holds(self._bytes(()), pl_module)

    def open(self, parts: Sequence[ConvertedPart]) -> None:
        """Plan before each forward of the part that trains, until `close`. It raises what `check` raises."""
        self.close()
        part = self.check(parts)
        self._parameters = [*self._pl_module.parameters()]
        self._hook.callback(before_forwards(part.called, partial(self.follow, part)))

    def close(self) -> None:
        """Plan no more. The plan stays in force."""
        self._hook.close()

    def check(self, parts: Sequence[ConvertedPart]) -> ConvertedPart:
        """Check that there is one part, and that what it keeps is decided here. Return it.

        Raises:
            ValueError: If there are several parts, or if the part is compiled or sharded.
        """
        if len(parts) != 1:
            names = ", ".join(f"`{part.path}`" for part in parts)
            raise ValueError(
                f"memory_budget plans for one part, and {len(parts)} are converted: {names}; set target=... to one "
                "module, or put them into one"
            )
        (part,) = parts
        if compiled_by_lightning(self._pl_module):
            raise ValueError(f"memory_budget can't plan for the LightningModule: it {_UNITS[is_compiled_unit]}")
        for is_unit, why_not in _UNITS.items():
            around = innermost_unit(self._pl_module, part.path, is_unit)
            if around is not None or any(map(is_unit, part.module.modules())):
                raise ValueError(f"memory_budget can't plan for `{part.path}`: it {why_not}")
        return part

    def begin_batch(self) -> None:
        """Note that a batch begins: no backward pass waits any more, so less may be recomputed."""
        self._in_batch = False

    def forget(self) -> None:
        """Plan anew before the next forward: modules were changed, or a batch that was tried is not used."""
        self._plans.clear()
        self._in_batch = False

    def merge(self, part: ConvertedPart, processes: int) -> None:
        """Recompute from now on at least what any process recomputes now. Every process must call this."""
        if processes == 1:
            return
        for choice in gathered(part.recompute, processes):
            self._least = most_of(self._least, choice)
        if self._least != part.recompute:
            print_lines(self._trainer, [f"ConvBN: `{part.path}`: recompute more, as another process must"])
            part.change(recompute=self._least)

    def follow(self, part: ConvertedPart, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan before a forward, unless there is a plan for inputs as large."""
        if not torch.is_grad_enabled():
            return
        part.record(inputs, kwargs)
        trained = tuple(parameter.requires_grad for parameter in self._parameters)
        situation = part.mode, trained, self._trainer.accumulate_grad_batches, tuple(part.pairs)
        size = sum(tensor.nbytes for tensor in tensors_of((inputs, kwargs)))
        if situation not in self._plans or size > self._plans[situation][0]:
            self._plans[situation] = size, self._choice(part, inputs, kwargs)
        chosen = most_of(self._plans[situation][1], self._least)
        if self._in_batch:
            chosen = most_of(part.recompute, chosen)
        self._in_batch = True
        if chosen != part.recompute:
            part.change(recompute=chosen)

    def _choice(self, part: ConvertedPart, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Choice:
        """Make a plan, say it, and return what to recompute."""
        try:
            plan = self._plan(part, inputs, kwargs)
        except CantCountError as error:
            rank_zero_warn(
                f"ConvBN: memory_budget: `{part.path}` can't be planned for, because {error}. All of its blocks run "
                "again in the backward pass"
            )
            return "blocks"
        print_lines(self._trainer, [f"ConvBN: `{part.path}`: {plan}"])
        log(self._trainer, {"predicted_peak_mib": plan.peak_bytes / MIB})
        if not plan.fits:
            rank_zero_warn(f"ConvBN: {plan.complaint()}")
        return plan.recompute

    def _plan(self, part: ConvertedPart, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MemoryPlan:
        needs, unknown = bytes_of_optimizers(self._trainer.optimizers)
        if unknown:
            rank_zero_warn(
                f"ConvBN: memory_budget: {', '.join(unknown)} can't step without data, and counts as an AdamW. Leave "
                "room for what it needs more"
            )
        options: dict[str, Any] = {"optimizer": needs, "elsewhere": self._elsewhere(part)}
        planner = StepPlanner(part.module, inputs, kwargs, mode=part.mode, pairs=part.pairs, **options)
        return planner.plan(self._bytes((inputs, kwargs)))

    def _elsewhere(self, part: ConvertedPart) -> int:
        """Return the bytes that a step needs beside the step of the part, and beside the optimizers.

        There are two of each gradient if gradients are accumulated, and if DDP has its buckets.
        """
        inside = set(part.module.parameters())
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        others = sum(parameter.nbytes for parameter in trained if parameter not in inside)
        waiting = sum(
            parameter.grad.nbytes
            for parameter in self._parameters
            if parameter.grad is not None and not parameter.requires_grad
        )
        if self._trainer.accumulate_grad_batches > 1 or self._trainer.world_size > 1:
            others += sum(parameter.nbytes for parameter in trained)
        return fixed_bytes(self._pl_module) + others + waiting

    def _bytes(self, inputs: Any) -> int:
        """Return the budget in bytes."""
        states = tensors_of([list(optimizer.state.values()) for optimizer in self._trainer.optimizers])
        return bytes_on(self._pl_module.device, self._budget, [*tensors_held(self._pl_module, inputs), *states])
