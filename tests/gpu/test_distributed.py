"""`DistributedDataParallel` on one device, over NCCL on a GPU and over Gloo elsewhere.

With one process as well, DDP broadcasts the buffers into themselves before every forward pass, and writes the gradients
into buckets of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.comparing import BACKWARD, relative
from helpers.networks import images
from helpers.smooth_network import smooth_net
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_convbn import Recompute, get_mode, set_mode

STEPS = 3

pytestmark = pytest.mark.filterwarnings("ignore:.*(process group|TCPStore|NCCL|barrier)")


@pytest.fixture
def ddp(device: torch.device) -> Iterator[dict[str, Any]]:
    """The arguments of DDP, in a group of one process."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {"device_ids": [0] if device.type == "cuda" else None}
    dist.destroy_process_group()


def trained(device: torch.device, options: dict[str, Any] | None, recompute: Recompute | None) -> dict[str, Tensor]:
    """Train for some steps; in Eval mode without `recompute`, and without DDP without options."""
    net = smooth_net(device, torch.float64)
    set_mode(net, "eval" if recompute is None else "tune", recompute=recompute or "none")
    model = net if options is None else DistributedDataParallel(net, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for seed in range(STEPS):
        optimizer.zero_grad()
        model(images(4, 3, 16, 16, dtype=torch.float64, seed=seed).to(device)).square().mean().backward()
        optimizer.step()
    set_mode(net, "train")
    return net.state_dict()


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
@pytest.mark.parametrize("recompute", ["none", "elementwise"])
def test_tune_under_ddp_is_eval_without(
    device: torch.device, ddp: dict[str, Any], recompute: Recompute, options: dict[str, Any]
) -> None:
    expected = trained(device, None, None)
    found = trained(device, {**ddp, **options}, recompute)
    off = {name: relative(found[name], tensor) for name, tensor in expected.items()}
    assert max(off.values()) <= 10 * BACKWARD, off  # the errors of the steps' gradients add up


def test_a_wrapped_model_is_switched(device: torch.device, ddp: dict[str, Any]) -> None:
    model = DistributedDataParallel(smooth_net(device, torch.float64), **ddp)
    batch = images(4, 3, 16, 16, dtype=torch.float64).to(device)
    expected = model(batch)
    for mode in ("tune", "deploy", "eval", "train", "tune"):
        set_mode(model, mode)
        assert get_mode(model) == mode
        assert relative(model(batch), expected) <= BACKWARD
