"""A small network around a function, in a mode with and without recomputation, and how the two are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from helpers.networks import images, randomized
from helpers.torch_settings import one_thread
from lightning_convbn import Mode, set_mode
from lightning_convbn.memory import count_saved_bytes

FLOAT = 4
VALUES = 2 * 6 * 8 * 8  # of one tensor behind the first pair
ACTIVATED, IMAGE = VALUES * FLOAT, 2 * 3 * 8 * 8 * FLOAT
PAIR = 2 * 6 * FLOAT  # the vectors that the first pair keeps

Run = Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """Applies a function: of the input, and of modules of its own."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.modules_of_function = nn.ModuleList(modules)

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, *self.modules_of_function)


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]


def net(*rest: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A pair of 6 channels with other layers behind it."""
    torch.manual_seed(0)
    return randomized(nn.Sequential(*conv(3, 6), *rest)).to(dtype)


def batch(dtype: torch.dtype = torch.float32, size: int = 8) -> Tensor:
    return images(2, 3, size, size, dtype=dtype)


def pair_of(model: nn.Module, mode: Mode = "tune") -> tuple[nn.Module, nn.Module]:
    """The model in a mode, and a copy that also recomputes."""
    recomputing = copy.deepcopy(model)
    set_mode(model, mode)
    set_mode(recomputing, mode, recompute="elementwise")
    return model, recomputing


@one_thread()
def results(model: nn.Module, input: Tensor, run: Run | None = None) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    input = input.clone().requires_grad_()
    output = (run or model)(input)
    loss = (output * images(*output.shape, seed=2).to(output.dtype)).sum()
    loss.backward()
    return [output.detach(), *(leaf.grad for leaf in (input, *model.parameters()) if leaf.grad is not None)]


def assert_same_bits(outputs: list[Tensor], expected: list[Tensor]) -> None:
    """Compare tensors to the bit. NaN equals NaN."""
    assert len(outputs) == len(expected)
    for output, other in zip(outputs, expected, strict=True):
        assert output.dtype is other.dtype
        torch.testing.assert_close(output, other, rtol=0, atol=0, equal_nan=True)


def assert_recomputed_alike(model: nn.Module, input: Tensor | None = None, mode: Mode = "tune") -> list[int]:
    """Outputs and gradients have the same bits with recomputation. Return the bytes kept without and with it."""
    input = batch() if input is None else input
    plain, recomputing = pair_of(model, mode)
    assert_same_bits(results(recomputing, input), results(plain, input))
    kept = [count_saved_bytes(one, input) for one in (plain, recomputing)]
    assert kept[1] <= kept[0]
    return kept


def several_forwards(model: nn.Module) -> Iterable[Tensor]:
    return torch.autograd.grad(sum(model(batch() + shift).square().sum() for shift in range(3)), [*model.parameters()])


def double_backward(model: nn.Module) -> Iterable[Tensor]:
    input = batch().requires_grad_()
    (slope,) = torch.autograd.grad(model(input).square().sum(), input, create_graph=True)
    seconds = torch.autograd.grad(slope.square().sum(), [*model.parameters()], allow_unused=True)
    return [slope.detach(), *(second for second in seconds if second is not None)]
