"""What a step of Tune mode costs, in counts that are the same on every machine: nodes, calls, passes over a weight.

Bytes have a test of their own, seconds a benchmark. A count that rises here is a step that has become slower.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers.models import images, random_model
from helpers.runs import LIGHTNING_SAYS, BoringModule, make_trainer, quick
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_convbn
from lightning_convbn import fuse_for_deploy, set_mode

pytestmark = LIGHTNING_SAYS

PACKAGE = str(Path(lightning_convbn.__file__).parent)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A network of 20 pairs and nothing that could not be folded."""
    return random_model("resnet18")


def step(model: nn.Module, pixels: int = 32) -> None:
    """Train on a batch of one."""
    model(images(1, 3, pixels, pixels)).sum().backward()


def nodes(output: Tensor) -> Counter[str]:
    """Count the nodes of an autograd graph by their names."""
    found, seen, waiting = Counter[str](), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found[type(node).__name__] += 1
            waiting += [following for following, _ in node.next_functions]
    return found


class WeightSized(TorchDispatchMode):
    """Counts the operations that write a tensor of the shape of a weight."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.names = shape, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        outputs = output if isinstance(output, tuple) else (output,)
        view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if not view and any(isinstance(one, Tensor) and one.shape == self.shape for one in outputs):
            self.names[func.overloadpacket.__name__] += 1
        return output


@pytest.mark.parametrize(("pixels", "by_autograd"), [(32, 7), (224, 12)])  # outputs smaller than weights, and larger
def test_a_pair_is_one_node_of_ours_or_five_of_autograd(network: nn.Module, pixels: int, by_autograd: int) -> None:
    """Beside them there are only the parameters that Deploy has not: two for each BatchNorm in the place of a bias."""
    deployed = nodes(fuse_for_deploy(network).requires_grad_(True)(images(1, 3, pixels, pixels)))
    set_mode(network, "tune")
    tuned = nodes(network(images(1, 3, pixels, pixels)))
    assert tuned["ConvolutionBackward0"] == by_autograd
    assert tuned["ConvolutionBackward0"] + tuned["_ConvBNBackward"] == deployed["ConvolutionBackward0"] == 20
    assert tuned["AccumulateGrad"] == deployed["AccumulateGrad"] + 20
    assert sum(tuned.values()) == sum(deployed.values()) + 20 + 4 * by_autograd


@pytest.mark.parametrize(("pixels", "most"), [(32, 26), (224, 24)])
def test_a_step_calls_few_python_functions_of_ours(network: nn.Module, pixels: int, most: int) -> None:
    """All of them in a forward and a backward pass, for each pair."""
    set_mode(network, "tune")
    step(network, pixels)
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(count)
    try:
        with torch.autograd.set_multithreading_enabled(False):  # or the backward pass would not be seen
            step(network, pixels)
    finally:
        sys.setprofile(None)
    assert calls / 20 <= most


@pytest.mark.parametrize(
    ("conv", "products"),
    [(nn.Conv2d(7, 5, 3, bias=False), {"mul": 3}), (nn.Conv2d(7, 80, 1, bias=False), {"mul": 2, "mul_": 1})],
)
def test_a_weight_is_gone_through_as_seldom_as_can_be(conv: nn.Conv2d, products: dict[str, int]) -> None:
    """Forward: the fold. Backward: the fold, the gradient, two products with it; ours take buffers that are there."""
    pair = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))
    set_mode(pair, "tune")
    counted = WeightSized(conv.weight.shape)
    with counted:
        output = pair(images(2, 7, 9, 9).requires_grad_())
    assert counted.names == {"mul": 1}
    counted.names.clear()
    with counted:
        torch.autograd.grad(output.sum(), [*pair.parameters()])
    assert counted.names == {"convolution_backward": 1, **products}
    with counted:
        output = pair(images(2, 7, 9, 9))  # the first pair of a network: no gradient wants the folded weight
    counted.names.clear()
    with counted:
        torch.autograd.grad(output.sum(), [*pair.parameters()])
    assert counted.names == {"convolution_backward": 1, **products, "mul": products["mul"] - 1}


def test_two_runs_from_one_seed_are_the_same_bit_for_bit() -> None:
    """Losses and weights, through the callback."""
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        module = BoringModule()
        make_trainer(quick(), max_epochs=2).fit(module)
        runs.append((module.losses["fit"], module.state_dict()))
    (losses, weights), (again, weights_again) = runs
    assert losses == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
