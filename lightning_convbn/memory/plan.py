"""The plan for a memory budget: the least recomputation whose training step fits. To make it, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_convbn.blocks.find import find_blocks
from lightning_convbn.compat import fake_tensor_mode, tree_leaves, tree_map_only
from lightning_convbn.layers.state import Mode, Recompute
from lightning_convbn.memory.largest_batch import largest_batch
from lightning_convbn.memory.measure import measure_memory_abstractly
from lightning_convbn.memory.optimizers import Optimizer, OptimizerBytes
from lightning_convbn.memory.use import MemoryUse, as_mib
from lightning_convbn.modes import set_mode
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.shadow import Shadow
from lightning_convbn.pairs.side_effects import side_effects_undone, tensors_of
from lightning_convbn.text import first_line

Choice = Recompute | tuple[str, ...]


class CantCountError(Exception):
    """A model can't run on tensors without data, or has no backward pass there. The text says why."""


@dataclass(frozen=True)
class MemoryPlan:
    """What to recompute, so that a training step fits into a budget. All sizes are in bytes.

    Attributes:
        recompute: As for `set_mode`: ``"none"``, ``"elementwise"``, or the names of the blocks that run again.
        peak_bytes: The predicted peak of a step, with the parameters, the buffers and what else the plan was given. It
            is the smallest peak that was found if none fits.
        budget_bytes: The budget.
        blocks: How many blocks of the model could run again.
        largest_batch: The largest batch whose step fits, if this one does not fit. 0 if not even one sample fits. None
            if this one fits, or if the inputs don't show which dimension is the batch.
    """

    recompute: Choice
    peak_bytes: int
    budget_bytes: int
    blocks: int = 0
    largest_batch: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the step fits into the budget."""
        return self.peak_bytes <= self.budget_bytes

    def __str__(self) -> str:
        what = self.recompute if isinstance(self.recompute, str) else f"{len(self.recompute)} of {self.blocks} blocks"
        return f"recompute {what}, predicted peak of a step {as_mib(self.peak_bytes)} of {as_mib(self.budget_bytes)}"

    def complaint(self) -> str:
        """Say what does not fit, and what would."""
        batch = {None: "Give a larger budget, or a smaller batch", 0: "Not even one sample fits"}.get(
            self.largest_batch, f"A batch of {self.largest_batch} fits"
        )
        return (
            f"no recomputation makes a step fit into memory_budget, {as_mib(self.budget_bytes)}; the smallest peak is "
            f"{as_mib(self.peak_bytes)}. {batch}"
        )


def most_of(one: Choice, other: Choice) -> Choice:
    """Return what recomputes all that either of two choices recomputes. ``"blocks"`` is every block."""
    if "blocks" in (one, other):
        return "blocks"
    names = [name for choice in (one, other) if not isinstance(choice, str) for name in choice]
    if names:
        return tuple(dict.fromkeys(names))
    return "none" if one == other == "none" else "elementwise"


class StepPlanner:
    """Plans a training step of a model.

    Args:
        model: Any module. It is not changed, and does not run.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        mode: ``"tune"``, ``"eval"`` or ``"train"``.
        pairs: As for `set_mode`.
        optimizer: As for `optimizer_bytes`.
        elsewhere: Bytes that the step needs beside what is counted: parameters, buffers, gradients of other modules.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        mode: Mode,
        pairs: ConvBNPairs,
        optimizer: Optimizer | OptimizerBytes,
        elsewhere: int,
    ) -> None:
        self._model = model
        self._arguments = (tuple(inputs), dict(kwargs))
        self._options: dict[str, Any] = {"mode": mode, "pairs": pairs, "optimizer": optimizer}
        self._elsewhere = elsewhere
        self._blocks = find_blocks(model, pairs).names
        self._counted: dict[Choice, MemoryUse] = {}

    def plan(self, budget: int) -> MemoryPlan:
        """Return the plan with the least recomputation that fits, or with the smallest peak if none fits.

        Args:
            budget: Bytes.

        Raises:
            CantCountError: If the step can't be counted without data.
        """
        levels: tuple[Recompute, ...] = ("none", "elementwise")
        for recompute in levels:
            if self._peak(recompute) <= budget:
                return self._planned(recompute, budget)
        ranked = self._ranked_blocks() if self._blocks else ()
        if ranked and self._peak(ranked) <= budget:
            return self._planned(self._fewest(ranked, budget), budget)
        smallest: Choice = min((*levels, *([ranked] if ranked else [])), key=self._peak)
        if smallest == ranked:
            smallest = self._fewest(ranked, self._peak(ranked))
        return self._planned(smallest, budget, self._largest_batch(smallest, budget))

    def _planned(self, recompute: Choice, budget: int, largest: int | None = None) -> MemoryPlan:
        return MemoryPlan(recompute, self._peak(recompute), budget, len(self._blocks), largest)

    def _fewest(self, ranked: tuple[str, ...], budget: int) -> tuple[str, ...]:
        """Return the first blocks, so many that the step fits, and with one less it does not.

        With all of them it must fit. The search interpolates by the bytes that the blocks save, and halves in every
        second turn.
        """
        saved = [0, *accumulate(self._saved_by(block) for block in ranked)]
        low, high, halve = 0, len(ranked), False
        while high - low > 1:
            lowest, highest = self._peak(ranked[:low] or "elementwise"), self._peak(ranked[:high])
            wanted = saved[low] + (saved[high] - saved[low]) * (lowest - budget) / max(lowest - highest, 1)
            guess = next((count for count in range(low, high) if saved[count] >= wanted), high)
            middle = (low + high) // 2 if halve else min(max(guess, low + 1), high - 1)
            fits = self._peak(ranked[:middle]) <= budget
            low, high, halve = (low, middle, not halve) if fits else (middle, high, not halve)
        return ranked[:high]

    def _ranked_blocks(self) -> tuple[str, ...]:
        """Return the blocks that save bytes, those first that save the most for each operation they run again."""
        operations = self._operations()
        saving = [block for block in self._blocks if self._saved_by(block) > 0]
        return tuple(sorted(saving, key=lambda block: self._saved_by(block) / max(operations[block], 1), reverse=True))

    def _saved_by(self, block: str) -> int:
        """Return the bytes that a block does not keep any more if all blocks run again."""
        before, after = (self._use(choice).saved_by_module for choice in ("elementwise", self._blocks))
        inside = [name for name in {*before, *after} if name == block or name.startswith(f"{block}.")]
        return sum(before.get(name, 0) - after.get(name, 0) for name in inside)

    def _operations(self) -> dict[str, int]:
        """Return the floating-point operations of the forward pass of each block: of its convolutions and products."""
        counter = FlopCounterMode(display=False)
        with _without_data(), fake_tensor_mode() as fake:
            shadow = Shadow(self._model).model
            set_mode(shadow, self._options["mode"], pairs=self._options["pairs"])
            args, kwargs = tree_map_only(Tensor, fake.from_tensor, self._arguments)
            with side_effects_undone(shadow, args, kwargs), torch.no_grad(), counter:
                shadow(*args, **kwargs)
        counts = counter.get_flop_counts()
        root = type(shadow).__name__
        return {block: sum(counts.get(f"{root}.{block}", {}).values()) for block in self._blocks}

    def _largest_batch(self, recompute: Choice, budget: int) -> int | None:
        """Return the largest batch that fits. The batch is the first dimension that all inputs share."""
        tensors = tensors_of(self._arguments)
        sizes = {tensor.shape[:1] for tensor in tensors}
        in_objects = len(tensors) != sum(isinstance(leaf, Tensor) for leaf in tree_leaves(self._arguments))
        if in_objects or len(sizes) != 1 or sizes == {torch.Size([])}:
            return None
        try:
            return largest_batch(lambda batch: self._peak_of(self._count(recompute, batch)), budget)
        except CantCountError:
            return None

    def _peak(self, recompute: Choice) -> int:
        return self._peak_of(self._use(recompute))

    def _peak_of(self, use: MemoryUse) -> int:
        if use.peak_bytes is None:
            raise CantCountError("the backward pass of the sum of its outputs fails")
        return self._elsewhere + use.peak_bytes

    def _use(self, recompute: Choice) -> MemoryUse:
        if recompute not in self._counted:
            self._counted[recompute] = self._count(recompute)
        return self._counted[recompute]

    def _count(self, recompute: Choice, batch: int | None = None) -> MemoryUse:
        inputs, kwargs = self._arguments
        if batch is not None:
            inputs, kwargs = tree_map_only(Tensor, lambda tensor: _in_batch(tensor, batch), self._arguments)
        with _without_data():
            return measure_memory_abstractly(
                self._model, inputs, kwargs, recompute=recompute, allow_real_run=False, **self._options
            )


@contextmanager
def _without_data() -> Iterator[None]:
    """Say of any error that a model can't run on tensors without data: a user's forward may raise anything there."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CantCountError(f"it can't run on tensors without data: {reason}") from error


def _in_batch(tensor: Tensor, batch: int) -> Tensor:
    """Return a tensor of another batch, whose samples share the memory of one."""
    return tensor.detach()[:1].expand(batch, *tensor.shape[1:]).requires_grad_(tensor.requires_grad)
