"""Measures the memory of a model: `measure_memory` runs it, `measure_memory_abstractly` runs it without data.

Both run a shadow of the model, and count in the same way (`step.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.compat import fake_tensor_mode, has_gradient_hooks, tree_map_only
from lightning_convbn.layers.state import Mode, Recompute
from lightning_convbn.memory.live_storages import tensors_in
from lightning_convbn.memory.optimizers import Optimizer, OptimizerBytes, check_optimizer
from lightning_convbn.memory.step import count_step
from lightning_convbn.memory.use import MemoryUse
from lightning_convbn.modes import set_mode
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.shadow import Shadow
from lightning_convbn.pairs.side_effects import side_effects_undone


def measure_memory(
    model: nn.Module,
    *inputs: Any,
    mode: Mode,
    pairs: ConvBNPairs | None = None,
    recompute: Recompute | Sequence[str] = "none",
    optimizer: Optimizer | OptimizerBytes = "none",
    **kwargs: Any,
) -> MemoryUse:
    """Count the bytes that a forward pass of a model in a mode keeps for the backward pass, and the peak of a step.

    **Kept**: a storage counts if the forward pass allocates it and the autograd graph alone keeps it alive. It counts
    once. An input counts if the graph keeps it. **Peak**: the most bytes that are alive at once, from the inputs to the
    last gradient. The backward pass is that of the sum of the outputs. The gradients of parameters stay, all others
    come and go. No ``.grad`` is written. The optimizer of a later step adds its state and what its step needs.

    Parameters, buffers and the folds of Deploy mode do not count. The model itself does not run: its shadow does, which
    shares the parameters (`pairs/shadow.py`). So neither the model nor the inputs are changed, and random states are
    restored.

    This looks at the life of storages. ``torch.autograd.graph.saved_tensors_hooks`` would miss tensors that other such
    hooks have packed, and tensors that a closure holds. What a kernel allocates for itself (workspaces of cuDNN, copies
    in another layout of oneDNN) is not in the peak, nor is what an allocator rounds up.

    Inputs from a PyTorch's ``FakeTensorMode`` give the same count, and nothing is computed or allocated.

    Args:
        model: Any module.
        *inputs: Positional arguments of its forward.
        mode: The mode to measure in. ``"deploy"`` computes as ``"tune"`` if a parameter wants a gradient.
        pairs: As for `set_mode`.
        recompute: As for `set_mode`.
        optimizer: Whose state and step are in the peak: ``"none"``, ``"sgd"`` with momentum, or ``"adamw"``. With an
            optimizer it is the peak of a later step in a Trainer: the gradients of the step before are still there in
            the forward pass.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The kept bytes, the peak and, on CUDA, the peak that the allocator has seen.

    Raises:
        ValueError: If ``mode``, ``recompute`` or ``optimizer`` is unknown, or ``pairs`` does not fit the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        >>> images = torch.zeros(4, 3, 16, 16)
        >>> measure_memory(model, images, mode="eval").saved_bytes  # input 12288, convolution's output 32768
        45056
        >>> measure_memory(model, images, mode="tune").saved_bytes  # input, and two values for each of 8 channels
        12352
        >>> measure_memory(model, images, mode="eval").peak_bytes // 1000  # the kept ones and BatchNorm's output 32768
        77
    """
    asked: dict[str, Any] = {"pairs": pairs, "recompute": recompute}
    return measure_memory_of_call(model, inputs, kwargs, mode=mode, optimizer=optimizer, **asked)


def measure_memory_of_call(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    mode: Mode,
    pairs: ConvBNPairs | None = None,
    recompute: Recompute | Sequence[str] = "none",
    optimizer: Optimizer | OptimizerBytes = "none",
) -> MemoryUse:
    """Count as `measure_memory` does. An argument of the forward may have the name of an option, as ``mode``.

    Args:
        model: Any module.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        mode: As for `measure_memory`.
        pairs: As for `set_mode`.
        recompute: As for `set_mode`.
        optimizer: As for `measure_memory`.
    """
    check_optimizer(optimizer)
    shadow = _shadow(model)
    first, (inputs, kwargs) = shadow.inputs(inputs, kwargs), shadow.inputs(inputs, kwargs)  # a forward may write there
    set_mode(shadow.model, mode, pairs=pairs, recompute=recompute)
    with side_effects_undone(shadow.model, inputs, kwargs), shadow.running():
        if mode == "deploy":
            with torch.no_grad():  # the folds that stay are not kept for a backward pass
                shadow.model(*first[0], **first[1])
        return _count(shadow.model, inputs, kwargs, optimizer, _peak_allocated_bytes(shadow.model, inputs, kwargs))


def measure_memory_abstractly(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    mode: Mode,
    pairs: ConvBNPairs | None = None,
    recompute: Recompute | Sequence[str] = "none",
    optimizer: Optimizer | OptimizerBytes = "none",
    allow_real_run: bool = True,
) -> MemoryUse:
    """Count as `measure_memory` does, but on tensors without data if the model allows it.

    So a model can be counted in Eval mode even if it only fits into memory in Tune mode. Some models read values, for
    example in the non-maximum suppression of a detector. They can't run without data.

    Args:
        model: Any module.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        mode: As for `measure_memory`.
        pairs: As for `set_mode`.
        recompute: As for `set_mode`.
        optimizer: As for `measure_memory`.
        allow_real_run: Run a model on the real inputs if it can't run without data. With False, its error is raised.
    """
    check_optimizer(optimizer)
    asked: dict[str, Any] = {"pairs": pairs, "recompute": recompute}
    try:
        shadow = _shadow(model)
        set_mode(shadow.model, mode, **asked)
        with fake_tensor_mode() as fake:
            args, named = tree_map_only(Tensor, fake.from_tensor, (tuple(inputs), dict(kwargs)))
            with side_effects_undone(shadow.model, args, named):
                return _count(shadow.model, args, named, optimizer, None)
    except Exception:  # a user's forward may raise anything if a tensor has no data
        if not allow_real_run:
            raise
        return measure_memory_of_call(model, tuple(inputs), dict(kwargs), mode=mode, optimizer=optimizer, **asked)


def _shadow(model: nn.Module) -> Shadow:
    """Return a shadow whose parameters have no hooks: a hook on a gradient would notice the backward pass."""
    shadow = Shadow(model)
    twins: dict[Tensor, nn.Parameter] = {}
    for module in shadow.model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if has_gradient_hooks(parameter):
                twin = twins.setdefault(parameter, nn.Parameter(parameter.detach(), parameter.requires_grad))
                module.register_parameter(name, twin)
    return shadow


def _count(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    optimizer: Optimizer | OptimizerBytes,
    allocated: int | None,
) -> MemoryUse:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = count_step(model, inputs, kwargs, parameters)
    return MemoryUse(sum(step.kept.values()), step.peak_with(optimizer, parameters), allocated, step.kept)


def _peak_allocated_bytes(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "cuda" or not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward_and_backward(model, inputs, kwargs)
    return torch.cuda.max_memory_allocated(device) - before


def forward_and_backward(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run a forward pass and the backward pass of the sum of its outputs. The gradients are not kept."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = tensors_in(model(*inputs, **kwargs))
        loss = sum(output.float().sum() for output in outputs if output.requires_grad)
        del outputs
        if isinstance(loss, Tensor):
            torch.autograd.grad(loss, parameters, allow_unused=True)
