"""CUDA graphs captured around a Tune step.

A graph holds the kernels that were launched while it was captured. What a step of ours needs for that:

- It reads no value on the host and copies none to it: that would wait for the GPU, which a capture refuses. This is so
  on any device, and is tested on any.
- What a recipe computes in the backward pass is launched while the backward pass is captured, on the stream of the
  forward pass, as autograd's own kernels are. So a replay computes it again.
- All that a recipe computes from is a parameter, a buffer or a tensor that the recipe holds until the backward pass has
  run. So the pool of the graph gives its memory to nobody else.

Parameters and buffers are read at each replay, where they were when the graph was captured. So a replay goes by the
weights of the moment, and writes in place between two replays are right. That nothing was written between the forward
and the backward pass is checked during the capture alone, as autograd's own check is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.comparing import BACKWARD, relative
from helpers.networks import images, random_model
from helpers.smooth_network import smooth_net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_convbn import Recompute, set_mode

NETWORKS = ["smooth", "resnet18", "mobilenet_v3_small", "googlenet"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),  # that of the warm-up
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
RECOMPUTE: tuple[Recompute, ...] = ("none", "elementwise")
# What waits for the device, or has an output whose shape depends on values.
WAITS = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2"}


def build(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    return smooth_net(device, dtype) if name == "smooth" else random_model(name).to(device=device, dtype=dtype)


class NothingIsRead(TorchDispatchMode):
    """Refuses each operation after which the host would know a value of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, target = func.overloadpacket.__name__, (kwargs or {}).get("device")
        assert name not in WAITS, func
        assert name != "_to_copy" or target is None or target == args[0].device, func
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NothingIsRead():
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_never_waits_for_the_device(device: torch.device, name: str, recompute: Recompute) -> None:
    net, batch = build(name, device), images(2, 3, 64, 64).to(device)
    set_mode(net, "tune", recompute=recompute)
    for autocast in (False, True):
        with nothing_waits(device):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                output = net(batch)
            output.float().square().mean().backward()


def test_that_something_waits_would_be_noticed(device: torch.device) -> None:
    with pytest.raises((AssertionError, RuntimeError)), nothing_waits(device):
        float(torch.ones(1, device=device))


def gradients_of(net: nn.Module, batch: Tensor) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    output = net(batch)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]


def captured(net: nn.Module, batch: Tensor) -> Callable[[], list[Tensor]]:
    """Capture a step; return what replays it. Where there are no graphs, the step is made anew."""
    if batch.device.type != "cuda":
        return lambda: gradients_of(net, batch)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            gradients_of(net, batch)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    net.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        found = gradients_of(net, batch)

    def replay() -> list[Tensor]:
        torch.empty(2**26, device=batch.device).fill_(float("nan"))  # whatever was freed by mistake is overwritten
        graph.replay()
        return found

    return replay


def change(net: nn.Module, seed: int) -> None:
    """Write all weights and statistics in place, as an optimizer and an average do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor))


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    assert max(relative(one, other) for one, other in zip(found, expected, strict=True)) <= BACKWARD


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_captured_step_is_evals_at_each_replay(device: torch.device, name: str, recompute: Recompute) -> None:
    """Forward and backward in one graph, replayed for other images and with other weights and statistics."""
    net, twin = (build(name, device, torch.float64) for _ in range(2))
    set_mode(twin, "eval")
    set_mode(net, "tune", recompute=recompute)
    batch = images(2, 3, 64, 64, dtype=torch.float64).to(device)
    replay = captured(net, batch)
    for seed in range(3):
        batch.copy_(images(2, 3, 64, 64, dtype=torch.float64, seed=seed))
        for model in (net, twin):
            change(model, seed)
        assert_alike(replay(), gradients_of(twin, batch))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["smooth", "resnet18"])
def test_graphed_callables_are_evals(device: torch.device, name: str, recompute: Recompute) -> None:
    """`torch.cuda.make_graphed_callables`: a graph for the forward and one for the backward pass."""
    net, twin = (build(name, device, torch.float64) for _ in range(2))
    set_mode(twin, "eval")
    set_mode(net, "tune", recompute=recompute)
    batch = images(2, 3, 64, 64, dtype=torch.float64).to(device)
    graphed = net
    if device.type == "cuda":
        graphed = torch.cuda.make_graphed_callables(net, (batch.clone(),))
    for seed in range(3):
        batch.copy_(images(2, 3, 64, 64, dtype=torch.float64, seed=seed))
        for model in (net, twin):
            change(model, seed)
        assert_alike(gradients_of(graphed, batch), gradients_of(twin, batch))


@pytest.mark.gpu
def test_a_graph_captured_in_deploy_mode_keeps_the_fold_of_its_capture(cuda: torch.device) -> None:
    """The fold is no part of the graph; so such a graph is right until weights change, and is captured again then."""
    net, batch = build("smooth", cuda, torch.float64), images(2, 3, 16, 16, dtype=torch.float64).to(cuda)
    pairs = set_mode(net, "deploy")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = net(batch)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            output = net(batch)
        for pair in pairs:
            change(net.get_submodule(pair.conv), 1)
        graph.replay()
        assert relative(output, expected) <= BACKWARD
        assert relative(output, net(batch)) > 1e-3
