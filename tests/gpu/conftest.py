"""Tests on every device: on the CPU always, so that the ordinary run covers them, and on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import nn

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")])]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.param)
    if device.type == "cuda":
        _warm_up(device)
    return device


@pytest.fixture
def cuda() -> torch.device:
    """For what there is on a GPU only. Mark the test `gpu`."""
    if not HAS_GPU:
        pytest.skip("no GPU")
    return torch.device("cuda")


@cache
def _warm_up(device: torch.device) -> None:
    """Have libraries allocate their workspaces, which stay: in this thread, and in autograd's own."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 4)).to(device)
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)(torch.ones(2, 3, 8, 8, device=device, dtype=dtype)).sum().backward()


@pytest.fixture(autouse=True)
def _same_kernels() -> Iterator[None]:
    """Have cuDNN choose the same algorithms in every run, none of which adds in an order of its own.

    The attributes are set one by one: `torch.backends.cudnn.flags` would touch the older switch for TF32, too, and
    PyTorch refuses to be told by both.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    yield
    cudnn.benchmark, cudnn.deterministic = before
