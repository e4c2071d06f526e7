"""A pair, and the rule that whatever is done with it equals plain Eval mode, or is an error that names both layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from helpers.comparing import assert_close
from helpers.networks import images, randomized
from lightning_convbn import set_mode

BOUND = 1e-9
NAMES = ("Conv2d(3, 8", "BatchNorm2d(8")  # what an error must say, so that a user finds the pair
MODES = [("tune", "none"), ("tune", "elementwise"), ("deploy", "none")]

Use = Callable[[Any, Tensor], Tensor]


class Pair(nn.Module):
    """A convolution and its BatchNorm; something may be set between them later, which no proof has seen."""

    between: Callable[[Tensor], Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, input: Tensor) -> Tensor:
        """Run what is between the layers, too, if there is something."""
        output = self.conv(input)
        return self.bn(output if self.between is None else self.between(output))  # type: ignore[no-any-return]


def pair(trained: str = "all") -> Pair:
    """A pair in its eval state with random statistics; "all", "conv", "bn" or "none" of its parameters are trained."""
    torch.manual_seed(0)
    net = randomized(Pair()).double().eval()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(trained == "all" or name.startswith(trained))
    return net  # type: ignore[return-value]


def image() -> Tensor:
    return images(2, 3, 12, 12, dtype=torch.float64)


def results(net: nn.Module, use: Use) -> list[Tensor | None]:
    """The output and all gradients, of the input too."""
    net.zero_grad()
    input = image().requires_grad_()
    output = use(net, input)
    if output.requires_grad:
        output.square().sum().backward()
    return [output.detach(), input.grad, *(parameter.grad for parameter in net.parameters())]


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Compare tensors within the rounding, and everything else exactly."""
    assert len(found) == len(expected)
    assert [isinstance(one, Tensor) or one for one in found] == [isinstance(one, Tensor) or one for one in expected]
    assert_close(*([one for one in each if isinstance(one, Tensor)] for each in (found, expected)), BOUND)


def check_right_or_named(use: Use, mode: Any, recompute: Any = "none", trained: str = "all") -> bool:
    """Check that a use equals Eval's, or raises and names the layers; that the model is plain and works afterwards.

    Returns:
        Whether it was right.
    """
    plain, net = pair(trained), pair(trained)
    assert len(set_mode(net, mode, recompute=recompute)) == 1
    expected = results(plain, use)
    found, error = None, ""
    try:
        found = results(net, use)
    except RuntimeError as raised:
        error = str(raised)
    if found is None:
        assert all(name in error for name in NAMES), error
    else:
        assert_same(found, expected)
    for each in (net, plain):
        each.between = None
    set_mode(net, "train")
    net.eval()
    assert str(net) == str(plain)
    assert [vars(one).keys() for one in net.modules()] == [vars(one).keys() for one in plain.modules()]
    assert_same(results(net, Pair.__call__), results(plain, Pair.__call__))
    return found is not None
