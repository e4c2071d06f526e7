"""Models that hide what they do with a convolution's output, and what an extra pass must not leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.comparing import FORWARD, relative
from helpers.networks import Net, images, randomized
from torch import Tensor, nn

from lightning_convbn import find_conv_bn_pairs, fuse_for_deploy, set_mode

IMAGE = images(2, 3, 6, 6)


def pair(forward: Callable[..., Any]) -> nn.Module:
    return randomized(Net(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)).eval())


def stashes(net: Net, x: Tensor) -> Tensor:
    net.features = [net.conv(x)]
    return net.bn(net.features[0])  # type: ignore[no-any-return]


class Opaque:
    """An output that pytrees don't look into."""

    def __init__(self, features: Tensor, output: Tensor) -> None:
        self.features, self.output = features, output


def gives_an_object(net: Net, x: Tensor) -> Opaque:
    features = net.conv(x)
    return Opaque(features, net.bn(features))


@pytest.mark.parametrize("forward", [stashes, gives_an_object])
@pytest.mark.parametrize("example_inputs", [None, (IMAGE,)])
def test_a_hidden_consumer_is_found(forward: Any, example_inputs: tuple[Tensor] | None) -> None:
    found = find_conv_bn_pairs(pair(forward), example_inputs=example_inputs)
    assert not len(found)
    assert any(reason in found.unpaired["bn"] for reason in ("is also used by", "can't be traced"))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_consumer_is_found() -> None:
    scripted = torch.jit.script(_doubled)

    def reads(net: Net, x: Tensor) -> Tensor:
        features = net.conv(x)
        return net.bn(features) + scripted(features) if x.sum() < 1e9 else features

    assert not len(find_conv_bn_pairs(pair(reads), example_inputs=(IMAGE,)))


def _doubled(x: Tensor) -> Tensor:
    return x * 2


def test_a_sequential_whose_parent_reads_between_its_layers_is_caught_by_the_recording() -> None:
    def iterates(net: Net, x: Tensor) -> list[Tensor]:
        outputs = [x]
        for layer in net.layers:
            outputs.append(layer(outputs[-1]) if float(outputs[-1].sum()) < 1e9 else outputs[-1])
        return outputs

    model = randomized(Net(iterates, layers=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval())
    assert find_conv_bn_pairs(model).untraced
    found = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert found.unpaired["layers.1"].startswith("the output of its convolution `layers.0` is also used by ")
    assert not found.untraced


def test_finding_pairs_is_not_in_the_way_of_a_pending_backward() -> None:
    model = pair(lambda net, x: net.bn(net.conv(x)))
    output = model(IMAGE)
    find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    output.sum().backward()


def test_a_deploy_copy_folds_only_what_is_proven_in_its_eval_state() -> None:
    def residual(net: Net, x: Tensor) -> Tensor:
        features = net.conv(x)
        return net.bn(features) if net.training else net.bn(features) + features  # type: ignore[no-any-return]

    model, image = pair(residual).double(), IMAGE.double()
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
