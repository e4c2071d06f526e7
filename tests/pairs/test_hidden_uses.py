"""Models that hide what they do with a convolution's output, and what an extra pass must not leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.comparing import FORWARD, relative
from helpers.networks import images, randomized
from torch import Tensor, nn

from lightning_convbn import (
    find_conv_bn_pairs,
    fuse_for_deploy,
    set_mode,
)

IMAGE = images(2, 3, 6, 6)


class Net(nn.Module):
    """A convolution, a BatchNorm, and something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        randomized(self.eval())

    def forward(self, input: Tensor) -> Any:
        return self.bn(self.conv(input))


class Stashing(Net):
    features: list[Tensor]

    def forward(self, input: Tensor) -> Tensor:
        self.features = [self.conv(input)]
        return self.bn(self.features[0])


class Opaque:
    """An output that pytrees don't look into."""

    def __init__(self, features: Tensor, output: Tensor) -> None:
        self.features, self.output = features, output


class ReturningAnObject(Net):
    def forward(self, input: Tensor) -> Opaque:
        features = self.conv(input)
        return Opaque(features, self.bn(features))


@pytest.mark.parametrize("cls", [Stashing, ReturningAnObject])
@pytest.mark.parametrize("example_inputs", [None, (IMAGE,)])
def test_a_hidden_consumer_is_found(cls: type[Net], example_inputs: tuple[Tensor] | None) -> None:
    found = find_conv_bn_pairs(cls(), example_inputs=example_inputs)
    assert not len(found)
    assert any(reason in found.unpaired["bn"] for reason in ("is also used by", "can't be traced"))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_consumer_is_found() -> None:
    scripted = torch.jit.script(_doubled)

    class Scripted(Net):
        def forward(self, input: Tensor) -> Tensor:
            features = self.conv(input)
            return self.bn(features) + scripted(features) if input.sum() < 1e9 else features

    assert not len(find_conv_bn_pairs(Scripted(), example_inputs=(IMAGE,)))


def _doubled(x: Tensor) -> Tensor:
    return x * 2


def test_a_sequential_whose_parent_reads_between_its_layers_is_caught_by_the_recording() -> None:
    class Iterating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, input: Tensor) -> list[Tensor]:
            outputs = [input]
            for layer in self.layers:
                outputs.append(layer(outputs[-1]) if float(outputs[-1].sum()) < 1e9 else outputs[-1])
            return outputs

    model = randomized(Iterating().eval())
    assert find_conv_bn_pairs(model).untraced
    found = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert found.unpaired["layers.1"].startswith("the output of its convolution `layers.0` is also used by ")
    assert not found.untraced


def test_finding_pairs_is_not_in_the_way_of_a_pending_backward() -> None:
    model = Net()
    output = model(IMAGE)
    find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    output.sum().backward()


def test_a_deploy_copy_folds_only_what_is_proven_in_its_eval_state() -> None:
    class Residual(Net):
        def forward(self, input: Tensor) -> Tensor:
            features = self.conv(input)
            output: Tensor = self.bn(features)
            return output if self.training else output + features

    model, image = Residual().double(), IMAGE.double()
    expected = model(image)
    set_mode(model.train(), "tune")
    assert relative(fuse_for_deploy(model)(image), expected) < FORWARD


@pytest.mark.parametrize(("epsilon", "folded"), [(1e-5, 1), (0.5, 0)])
def test_a_frozen_batchnorm_with_an_epsilon_of_its_own_is_not_folded_by_another(epsilon: float, folded: int) -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, torch.ones(4))

        def forward(self, input: Tensor) -> Tensor:
            weight, bias, mean, var, _ = (buffer.view(1, -1, 1, 1) for buffer in self.buffers())
            return (input - mean) * weight * (var + epsilon).rsqrt() + bias

    assert len(find_conv_bn_pairs(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d()))) == folded
