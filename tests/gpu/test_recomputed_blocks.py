"""Blocks that run again in the backward pass, on every device: the same bits, with dropout, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.blocks import Residual, Tower, batch
from helpers.recomputation import assert_same_bits
from torch import Tensor, nn

from lightning_convbn import recomputed_blocks, set_mode


def step(model: nn.Module, recompute: Any, input: Tensor) -> list[Tensor]:
    set_mode(model, "tune", recompute=recompute)
    torch.manual_seed(0)
    output = model(input)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [*model.parameters()])]


@pytest.mark.parametrize("between", [nn.SiLU, nn.Dropout])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_bits_are_those_without_recomputation(
    device: torch.device, between: type[nn.Module], autocast: bool
) -> None:
    model = Tower(lambda: Residual(between=between)).train().to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        expected = step(model, "none", batch().to(device))
        assert_same_bits(step(model, "blocks", batch().to(device)), expected)
    assert recomputed_blocks(model).names == ("blocks.0", "blocks.1", "blocks.2")
    assert recomputed_blocks(model).left_out == {}
