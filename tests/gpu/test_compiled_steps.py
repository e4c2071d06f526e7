"""`torch.compile` on each device: by inductor on a GPU; on a CPU by what needs no C++ compiler, which is quick."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.allocator import kept_by_allocator
from helpers.comparing import BACKWARD, relative
from helpers.networks import images
from helpers.smooth_network import smooth_net
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_convbn import Mode, Recompute, set_mode

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's, about the machine and about itself


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(
    device: torch.device, mode: Mode, recompute: Recompute = "none", options: dict[str, Any] | None = None
) -> nn.Module:
    net = smooth_net(device, torch.float64)
    set_mode(net, mode, recompute=recompute)
    net.compile(fullgraph=True, dynamic=False, **(options or {"backend": backend(device)}))
    return net


def backend(device: torch.device) -> str:
    """A partitioner is at work in both."""
    return "inductor" if device.type == "cuda" else "aot_eager_decomp_partition"


def step(net: nn.Module, device: torch.device) -> dict[str, Tensor]:
    batch = images(4, 3, 16, 16, dtype=torch.float64).to(device)
    output = net(batch)
    output.square().mean().backward()
    found = {"output": output.detach().clone(), **{name: p.grad for name, p in net.named_parameters()}}
    net.zero_grad(set_to_none=True)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
def test_compiled_tune_is_eager_eval(device: torch.device, recompute: Recompute) -> None:
    expected = step(smooth_net(device, torch.float64), device)
    net = compiled(device, "tune", recompute)
    for _ in range(2):
        found = step(net, device)
        assert max(relative(found[name], tensor) for name, tensor in expected.items()) <= BACKWARD
    assert not counters["graph_break"]


def test_compiled_tune_keeps_no_more_than_compiled_eval(device: torch.device) -> None:
    """Nor less, necessarily: a compiler may compute the BatchNorm again, from the output of the convolution."""
    batch = images(8, 3, 32, 32, dtype=torch.float64).to(device)
    kept = []
    for mode in ("eval", "tune"):
        net = compiled(device, mode)
        net(batch).sum().backward()
        kept.append(kept_by_allocator(net, batch))
    assert kept[1] <= 1.01 * kept[0]


@pytest.mark.gpu
def test_reduce_overhead_is_eager_eval(cuda: torch.device) -> None:
    """Which runs what inductor has compiled as CUDA graphs, from the third call on."""
    expected = step(smooth_net(cuda, torch.float64), cuda)
    net = compiled(cuda, "tune", options={"mode": "reduce-overhead"})
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        found = step(net, cuda)
        assert max(relative(found[name], tensor) for name, tensor in expected.items()) <= BACKWARD
