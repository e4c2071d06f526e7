"""Elementwise recomputation where something changes between the forward and the backward pass: the same bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.recomputation import Apply, assert_same_bits, batch, net, pair_of, results
from torch import Tensor


def written_then_activated(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return F.leaky_relu(y, 0.1, inplace=True)


def activated_with_an_alias_alive(y: Tensor) -> Tensor:
    alias = y.detach()
    return torch.sigmoid_(y) * (1 + 0 * alias.sum())


def saved_by_a_statistic_first(y: Tensor) -> Tensor:
    statistic = y.abs().mean()
    return F.gelu(F.silu(y, inplace=True)) + 0 * statistic.detach()


def half_plus_float_in_place(y: Tensor) -> Tensor:
    k = F.silu(y).half()
    k += y
    return F.gelu(k.float())


def in_place_on_a_view(y: Tensor) -> Tensor:
    v = F.silu(y)[:, :, :5, :5]
    return F.gelu(F.silu(v, inplace=True))


def sliced_by_a_counter(y: Tensor) -> Tensor:
    start, total = torch.tensor(0), y.new_zeros(())
    for _ in range(3):
        total = total + F.silu(y[:, start : start + 2] * 2).sum()
        start += 2
    return total + F.silu(y)


def indexed_by_an_array(y: Tensor) -> Tensor:
    chosen = np.array([0, 1])
    z = F.silu(y[:, chosen] * 2)
    chosen[1] = 5
    return z.sum() + F.silu(y)


def padded_by_a_list(y: Tensor) -> Tensor:
    pads = [1, 1, 0, 0]
    z = F.silu(F.pad(y, pads))
    pads[2] = 5
    return z.sum() + F.silu(y)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        written_then_activated,
        activated_with_an_alias_alive,
        saved_by_a_statistic_first,
        half_plus_float_in_place,
        in_place_on_a_view,
        sliced_by_a_counter,
        indexed_by_an_array,
        padded_by_a_list,
    ],
    ids=lambda function: function.__name__,
)
def test_the_bits_are_the_plain_ones(function: Callable[[Tensor], Tensor], frozen: bool) -> None:
    models = pair_of(net(Apply(function)).requires_grad_(not frozen))
    assert_same_bits(*reversed([results(model, batch()) for model in models]))


def test_a_view_that_is_asked_for_twice_sees_a_write_in_between() -> None:
    def write_late(model: torch.nn.Module) -> None:
        input = batch().requires_grad_()
        y = model(input)
        k = F.silu(y)
        v = y[:, :4]
        p, q = F.silu(v).sum() + 0 * k.sum(), F.gelu(v).sum()
        for loss in (p, q, p):
            torch.autograd.grad(loss, input, retain_graph=True)
        with torch.no_grad():
            y.mul_(2)
        torch.autograd.grad(q, input)

    for model in pair_of(net()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            write_late(model)
