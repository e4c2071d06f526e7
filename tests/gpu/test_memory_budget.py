"""A memory budget on each device: `"auto"` is what a card has left, and the planned step fits into it.

What a card has left is set by a limit for the process. On a CPU the same amount is given as a number, and the
allocator is asked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.allocator import allocated_by, limited_to
from helpers.networks import images, random_model
from torch import Tensor, nn

from lightning_convbn import MemoryPlan, Mode, fit_memory_budget
from lightning_convbn.memory import forward_and_backward, measure_memory_abstractly
from lightning_convbn.memory.budget import MARGIN, fixed_bytes

BATCH = {"cpu": (4, 64), "cuda": (64, 224)}  # images, and pixels of an edge


def peak(model: nn.Module, batch: Tensor, mode: Mode, recompute: Any) -> int:
    found = measure_memory_abstractly(model, (batch,), {}, mode=mode, recompute=recompute).peak_bytes
    assert found is not None
    return found


def planned_within(amount: int, model: nn.Module, batch: Tensor) -> tuple[MemoryPlan, bool]:
    """Plan for an amount that a step may take; return the plan, and whether a step is within what is left for it.

    What is left is more than the amount, by the margin of ``"auto"``: the plan knows of no workspaces of kernels.
    """
    left = int(amount / (1 - MARGIN))

    def step() -> None:
        forward_and_backward(model, (batch,), {})

    if batch.device.type == "cpu":
        plan = fit_memory_budget(model, batch, memory_budget=fixed_bytes(model) + amount)
        return plan, allocated_by(step, batch.device).most + batch.nbytes <= left
    step()  # libraries allocate their workspaces, which stay
    with limited_to(left, batch.device):
        plan = fit_memory_budget(model, batch, memory_budget="auto")
        try:
            step()
        except torch.OutOfMemoryError:
            return plan, False
    return plan, True


@pytest.mark.parametrize("fitting", ["elementwise", "blocks"])
def test_the_plan_for_what_is_left_fits_where_eval_does_not(device: torch.device, fitting: str) -> None:
    number, pixels = BATCH[device.type]
    model, batch = random_model("mobilenet_v2").to(device), images(number, 3, pixels, pixels).to(device)
    before = {"elementwise": "none", "blocks": "elementwise"}[fitting]
    amount = (peak(model, batch, "tune", before) + peak(model, batch, "tune", fitting)) // 2
    plan, fits = planned_within(amount, model, batch)
    assert fits
    assert plan.fits
    assert plan.recompute == fitting or (fitting == "blocks" and isinstance(plan.recompute, tuple))
    assert peak(model, batch, "eval", "none") > amount / (1 - MARGIN)


def test_auto_is_for_cuda_alone(device: torch.device) -> None:
    model, batch = random_model("mobilenet_v2").to(device), images(2, 3, 32, 32).to(device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="memory_budget='auto' needs a CUDA device, and the model is on 'cpu'"):
            fit_memory_budget(model, batch, memory_budget="auto")
        return
    torch.cuda.empty_cache()  # what is cached is free for this process, too
    free, _ = torch.cuda.mem_get_info(device)
    plan = fit_memory_budget(model, batch, memory_budget="auto")
    assert (plan.recompute, plan.fits) == ("none", True)
    assert 0.8 * free < plan.budget_bytes < free
