"""How much work Tune mode adds to a step, in counts that are the same on every machine.

Bytes have a test of their own, seconds a benchmark. A count that rises here is a step that has become slower.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.counting_operations import NewTensors
from helpers.networks import images, random_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_convbn import fuse_for_deploy, set_mode


def nodes(output: Tensor) -> int:
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


class Kernels(TorchDispatchMode):
    """Counts the operations that write a tensor; of one shape, if there is one. A GPU launches a kernel for each."""

    def __init__(self, shape: torch.Size | None = None) -> None:
        super().__init__()
        self.shape, self.names = shape, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        outputs = output if isinstance(output, tuple) else (output,)
        view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if not view and any(isinstance(one, Tensor) and self.shape in (None, one.shape) for one in outputs):
            self.names[func.overloadpacket.__name__] += 1
        return output

    def taken(self) -> Counter[str]:
        taken, self.names = self.names, Counter()
        return taken


@pytest.mark.parametrize("pixels", [32, 224])  # outputs smaller than weights, and larger
def test_a_pair_adds_at_most_six_nodes_to_the_graph(pixels: int) -> None:
    """One each for scale, shift, product, two views and the parameter that a Deploy copy does not have."""
    network = random_model("resnet18")  # 20 pairs and nothing that could not be folded
    deployed = nodes(fuse_for_deploy(network).requires_grad_(True)(images(1, 3, pixels, pixels)))
    set_mode(network, "tune")
    assert nodes(network(images(1, 3, pixels, pixels))) <= deployed + 6 * 20


@pytest.mark.parametrize("conv", [nn.Conv2d(7, 5, 3, bias=False), nn.Conv2d(7, 80, 1, bias=False)])
def test_a_step_goes_through_a_weight_as_seldom_as_can_be(conv: nn.Conv2d) -> None:
    """Forward: the fold. Backward: the fold again, its gradient, and the two products with that gradient."""
    pair = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))
    set_mode(pair, "tune")
    with Kernels(conv.weight.shape) as counted:
        output = pair(images(2, 7, 9, 9).requires_grad_())
        assert counted.taken() == {"mul": 1}
        torch.autograd.grad(output.sum(), [*pair.parameters()])
        assert counted.taken() <= Counter({"convolution_backward": 1, "mul": 3})
        output = pair(images(2, 7, 9, 9))  # the first pair of a network: no gradient reads the folded weight
        counted.taken()
        torch.autograd.grad(output.sum(), [*pair.parameters()])
        assert counted.taken() <= Counter({"convolution_backward": 1, "mul": 2})


FORWARD = {"add": 1, "rsqrt": 1, "mul": 2, "addcmul": 1, "convolution": 1}
BACKWARD = {"convolution_backward": 1, "mul": 6, "sum": 1, "add": 1}


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
def test_a_pair_launches_no_more_kernels_than_its_equations_have(recompute: Any) -> None:
    """Forward: r in two steps, s, b', w', the convolution. Backward: w' again, and the gradients of w', b' and s."""
    pairs = [nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
    network = nn.Sequential(*pairs)
    set_mode(network, "tune", recompute=recompute)
    with Kernels() as counted:
        output = network[0](images(2, 8, 20, 20).requires_grad_())
        counted.taken()
        output = network[1](output)
        assert counted.taken() == {**FORWARD, "relu": 1}
        output = network[2](output)
        gradient = torch.ones_like(output)
        counted.taken()
        output.backward(gradient)
        backward = counted.taken()
    once = Counter({**BACKWARD, "threshold_backward": 1})
    assert backward == once + once + once


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_an_activation_is_computed_again_in_the_memory_of_its_input(activation: type[nn.Module]) -> None:
    """The output of a BatchNorm in Train mode is computed again, for the next convolution alone."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 5, 1))
    set_mode(network, "train", recompute="elementwise")
    output = network(images(2, 3, 20, 20))
    with NewTensors({torch.Size((2, 8, 20, 20))}) as new:
        output.sum().backward()
    assert new.count == 4  # of the forward pass one; and a gradient of each of the three layers
