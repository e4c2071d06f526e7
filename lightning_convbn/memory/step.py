"""Runs one step of a model, or one call of a function, and counts: what is kept, and the most that is alive at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_convbn.compat import tree_map_only
from lightning_convbn.memory.live_storages import StorageLedger, tensors_in
from lightning_convbn.memory.optimizers import Optimizer, OptimizerBytes, optimizer_bytes


@dataclass(frozen=True)
class StepBytes:
    """What one step takes, in bytes, beyond parameters and buffers.

    Attributes:
        kept: Module -> what it allocated in the forward pass and what is kept for the backward pass.
        inputs: The inputs. They are alive during the whole step.
        gradients: One gradient for each parameter that gets one.
        forward_peak: The most that is alive at once in the forward pass.
        peak: The same, in the forward and the backward pass. None if the backward pass fails, or was not run.
    """

    kept: dict[str, int]
    inputs: int
    gradients: int
    forward_peak: int
    peak: int | None

    def peak_with(self, optimizer: Optimizer | OptimizerBytes, parameters: Sequence[Tensor]) -> int | None:
        """Return the peak of a step with an optimizer.

        With one it is the peak of a later step, in which the optimizer's state is there from the beginning. As
        Lightning does it, the gradients of the step before are still there in the forward pass, and are freed before
        the backward pass.

        Args:
            optimizer: As for `optimizer_bytes`.
            parameters: The parameters that want a gradient.
        """
        if self.peak is None or optimizer == "none":
            return self.peak
        needs = optimizer_bytes(parameters, optimizer)
        forward = self.forward_peak + self.gradients
        return needs.state + max(forward, self.peak, self.inputs + self.gradients + needs.temporary)


def count_step(
    function: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any], parameters: Sequence[Tensor] | None
) -> StepBytes:
    """Run a forward pass, and the backward pass of the sum of its outputs. No ``.grad`` is written.

    Args:
        function: A module, or any function.
        inputs: Its positional arguments.
        kwargs: Its keyword arguments.
        parameters: Those that want a gradient. Inputs that want one get one, too. None: no backward pass.
    """
    ledger = StorageLedger(function)
    with torch.enable_grad(), ledger:
        # The caller holds the inputs, so they would always be alive. Copies are only alive if the graph keeps them.
        args, named = tree_map_only(Tensor, _copied, (tuple(inputs), dict(kwargs)))
        given = sum(ledger.bytes_alive().values())
        wanted = [get_gradient_edge(tensor) for tensor in tensors_in((args, named)) if tensor.requires_grad]
        output = function(*args, **named)
        leaves = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
        # In PyTorch 2.9 the Python node of an autograd.Function does not keep alive what it has saved. A node after it
        # does, so each output gets a view. PyTorch 2.14 does not need this.
        graph = [get_gradient_edge(leaf.view_as(leaf)) for leaf in leaves]
        like = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        del args, named, output, leaves
    gc.collect(1)  # the forward pass may have left reference cycles behind
    kept, forward_peak = ledger.bytes_alive(), ledger.peak
    if parameters is None:
        return StepBytes(kept, given, 0, forward_peak, None)
    ledger.hold_inputs(given)
    try:
        with ledger:
            ones = [torch.ones((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in like]
            asked: Any = [*parameters, *wanted]
            gradients = torch.autograd.grad(graph, asked, ones, allow_unused=True) if graph and asked else ()
    except Exception:  # some operations have no backward pass, or none in the eval state
        return StepBytes(kept, given, 0, forward_peak, None)
    size = sum(gradient.nbytes for gradient in gradients[: len(parameters)] if gradient is not None)
    return StepBytes(kept, given, size, forward_peak, ledger.peak)


def count_saved_bytes(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> int:
    """Count the bytes that one call of a function keeps for the backward pass; see `measure_memory`."""
    return sum(saved_bytes_by_module(function, *inputs, **kwargs).values())


def saved_bytes_by_module(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> dict[str, int]:
    """Count the bytes that one call of a function keeps, by the module that allocated them; see `MemoryUse`.

    If the function is a module, its submodules are told apart. Modules that keep nothing are left out.
    """
    return count_step(function, inputs, kwargs, None).kept


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy that is no leaf of the graph. The graph holds each leaf that wants a gradient, saved or not."""
    return tensor * 1 if tensor.requires_grad else tensor.clone()
