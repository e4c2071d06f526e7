"""One training step, and its measurements: bytes as the allocator counts them, seconds, gradients."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from examples.benchmarks.allocator import allocations
from examples.benchmarks.networks import Workload, loss_of


class Step:
    """Runs forward, mean of the outputs and backward, and sets the gradients to None. There is no optimizer.

    Args:
        workload: Holds the batch.
        model: The network as a variant has built it.
        device: Where it runs.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
    """

    def __init__(self, workload: Workload, model: nn.Module, device: torch.device, precision: str) -> None:
        self.inputs = workload.inputs
        self.model = model
        self.device = device
        self.bf16 = precision == "bf16"

    def __call__(self, *, fresh_inputs: bool = False) -> None:
        """Make a step."""
        self._backward(self.loss(fresh_inputs=fresh_inputs))

    def loss(self, *, fresh_inputs: bool = False) -> Tensor:
        """Run the forward pass; with `fresh_inputs` on a copy of the batch, so that it counts as allocated."""
        torch.manual_seed(0)  # a detector samples proposals; all variants need the same ones
        return self._loss(tree_map_only(Tensor, torch.clone, self.inputs) if fresh_inputs else self.inputs)

    def gradients(self) -> dict[str, Tensor]:
        """Make a step and return the gradients by the names of the parameters."""
        self.loss().backward()  # type: ignore[no-untyped-call]
        found = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.drop_gradients()
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def drop_gradients(self) -> None:
        """Set the gradients to None."""
        self.model.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Time a step."""
        self._wait()
        started = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - started

    def replay_seconds(self, times: int) -> list[float]:
        """Time replays of a step that was captured as a CUDA graph: the GPU's work alone, without its launch."""
        aside, here = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self._backward(self._loss(self.inputs))
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._backward(self._loss(self.inputs))
        found = []
        for _ in range(times + 1):
            self._wait()
            started = time.perf_counter()
            graph.replay()
            self._wait()
            found.append(time.perf_counter() - started)
        return found[1:]  # the first one warms up

    def memory(self) -> dict[str, int]:
        """Return bytes as the allocator counts them, beyond those allocated before the step.

        ``kept_bytes`` are allocated after one forward, while its loss is alive; the batch counts if it is kept.
        ``peak_bytes`` are the most at once in forward and backward, with the gradients of the parameters.
        """
        return self._memory_on_cuda() if self.device.type == "cuda" else self._memory_on_cpu()

    def _memory_on_cpu(self) -> dict[str, int]:
        alive = []
        kept = allocations(lambda: alive.append(self.loss(fresh_inputs=True)))
        alive.clear()
        whole = allocations(lambda: self(fresh_inputs=True))
        return {"kept_bytes": sum(kept), "peak_bytes": max(accumulate(whole))}

    def _memory_on_cuda(self) -> dict[str, int]:
        gc.collect()
        before = torch.cuda.memory_allocated(self.device)
        loss = self.loss(fresh_inputs=True)
        gc.collect()
        kept = torch.cuda.memory_allocated(self.device) - before
        del loss
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self(fresh_inputs=True)
        return {
            "kept_bytes": kept,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) - before,
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self.drop_gradients()

    def _loss(self, inputs: Any) -> Tensor:
        with self._autocast():
            output = self.model(*inputs)
        return loss_of(output)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def deviation(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative deviation of a parameter's gradient, by norms.

    A norm below a millionth of the largest norm is mostly rounding. Its deviation is relative to that millionth.

    Args:
        gradients: By name of the parameter.
        expected: The gradients to compare with. Parameters that only one side has are left out.
    """
    norms = {name: float(torch.linalg.vector_norm(gradient.double())) for name, gradient in expected.items()}
    least = 1e-6 * max(norms.values())
    return max(
        float(torch.linalg.vector_norm(gradients[name].double() - expected[name].double())) / max(norm, least)
        for name, norm in norms.items()
        if name in gradients
    )
