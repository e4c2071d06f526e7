"""`fit_memory_budget`: a model in a mode, with the least recomputation whose training step fits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_convbn.layers.state import Mode
from lightning_convbn.memory.budget import bytes_on, check_budget_holds, checked_budget, fixed_bytes, tensors_held
from lightning_convbn.memory.optimizers import Optimizer, check_optimizer
from lightning_convbn.memory.plan import CantCountError, MemoryPlan, StepPlanner
from lightning_convbn.modes import RECOMPUTING_MODES, check_choice, set_mode
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.shadow import Shadow


def fit_memory_budget(
    model: nn.Module,
    *inputs: Any,
    memory_budget: int | str,
    mode: Mode = "tune",
    pairs: ConvBNPairs | None = None,
    optimizer: Optimizer = "none",
    **kwargs: Any,
) -> MemoryPlan:
    """Put a model in a mode with the least recomputation whose training step fits into a memory budget.

    The step is counted as `measure_memory` counts it, on tensors without data: parameters, buffers, and the peak of
    forward and backward pass with all gradients and the optimizer. ``"none"`` comes first, then ``"elementwise"``, then
    as many blocks as needed: those first that save the most bytes for the operations that they run again.

    Args:
        model: Any module.
        *inputs: Positional arguments of its forward. A larger batch needs a new plan.
        memory_budget: Bytes, or a text such as ``"8GiB"``. ``"auto"`` is what a CUDA device has left for
            this process, less a tenth.
        mode: ``"tune"``, ``"eval"`` or ``"train"``.
        pairs: As for `set_mode`.
        optimizer: As for `measure_memory`.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The plan, in force. If nothing fits, it is the one with the smallest peak; ask ``plan.fits``.

    Raises:
        ValueError: If an argument can't be used, if the budget is less than the parameters and buffers, or if the model
            can't run on tensors without data. The model is as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1))
        >>> images = torch.zeros(4, 3, 16, 16)
        >>> print(fit_memory_budget(model, images, memory_budget="1MiB"))
        recompute none, predicted peak of a step 0.107 MiB of 1.0 MiB
    """
    check_choice("mode", mode, RECOMPUTING_MODES)
    check_optimizer(optimizer)
    budget = checked_budget(memory_budget)
    chosen = set_mode(Shadow(model).model, mode, pairs=pairs)  # refuses bad arguments before the model is touched
    own = fixed_bytes(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    room = bytes_on(device, budget, tensors_held(model, (inputs, kwargs)))
    check_budget_holds(room, model)
    try:
        planner = StepPlanner(model, inputs, kwargs, mode=mode, pairs=chosen, optimizer=optimizer, elsewhere=own)
        plan = planner.plan(room)
    except CantCountError as error:
        raise ValueError(f"model: {type(model).__name__} can't be planned for, because {error}") from error
    set_mode(model, mode, pairs=chosen, recompute=plan.recompute)
    return plan
