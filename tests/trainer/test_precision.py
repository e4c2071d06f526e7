"""Precisions: Tune mode's rounding error is no larger than the number of its roundings explains, in each precision.

A rounding error is a matter of luck. It depends on the weights, and on the order in which a processor's kernel adds.
So each precision is tried on many networks, and a test asks of the mean over all of them. The networks have no kinks:
where the input of a ReLU changes its sign by a rounding, the gradient jumps, and its error says nothing about folding.

**The bound.** Errors are those against the same network in float64, before anything was rounded. Let a rounding of the
weights add 1 to the squared error. Write ``q`` for the mean square of the folded bias over that of ``scale * conv``.
The networks have ``q <= 1/4``. Roundings of the convolution's and the BatchNorm's output count as little as one likes,
because the mean over positions and images averages them out. What is left is, in the squared error:

- bf16-true and 16-true: Eval mode rounds the weight (1), gamma (1), the variance (1/4, by the square root), and the
  shift (``q``). Tune mode also rounds the folded weight (1) and the folded bias (``q``).
  The ratio is at most ``(13/4 + 2 q) / (9/4 + q) <= 3/2``.
- 16-mixed and bf16-mixed: Eval mode rounds the weight (1). Tune mode rounds the folded weight (1) and bias (``q``).
  The ratio is at most ``1 + q <= 5/4``.
- 32-true: both modes compute the same scale and shift. What differs is the sum of the ``K`` products. If a kernel adds
  one by one, the squared rounding errors of Eval mode's sum add up to ``K / 2``. If Tune mode's sum starts at the bias,
  each partial sum is larger by it: ``K / 2 + K q``. The ratio is at most ``1 + 2 q <= 3/2``.

So the ratio of the errors is at most ``sqrt(3/2)`` in each. A fold in half precision rounds each of ``var + eps``, its
root, the scale, the product and two terms of the bias: this adds ``13/4 + 3 q`` to the above, which makes 1.6 of
Eval mode's error, or more. `test_a_fold_in_half_precision_would_be_noticed` shows that the test sees it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from helpers.lightning_matrix import names_that_work
from helpers.networks import images
from helpers.tiny_training import LIGHTNING_SAYS, BoringModule, make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_convbn import find_conv_bn_pairs

pytestmark = [
    *LIGHTNING_SAYS,
    pytest.mark.filterwarnings("ignore:.*precision='16-mixed'.* but AMP with fp16 is not supported on CPU"),
]

NETWORKS = 64
SHIFT = 1 / 4  # the mean square of a folded bias over that of the scaled convolution's output, at most
BOUND = math.sqrt(3 / 2)  # of the ratio of the errors
FALSE_ALARMS = 1e-3  # how often a comparison fails, at most, if the true ratio is the bound
STUDENT = 3.225  # the quantile 1 - FALSE_ALARMS of Student's t for NETWORKS - 1 degrees of freedom
PRECISIONS = [
    "32-true",
    "64-true",
    "bf16-true",
    pytest.param("16-true", marks=pytest.mark.slow),  # a CPU has to emulate it
    "bf16-mixed",
    "16-mixed",
]


class Errors(NamedTuple):
    """The errors of every network, relative to the exact values."""

    features: Tensor
    gradients: Tensor


def conv_bn(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Sequential:
    """Build a pair and an activation without kinks."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Inverted(nn.Module):
    """An inverted residual block with a depthwise convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_bn(channels, 2 * channels, 1),
            *conv_bn(2 * channels, 2 * channels, 3, groups=2 * channels),
            *conv_bn(2 * channels, channels, 1)[:2],
        )

    def forward(self, input: Tensor) -> Tensor:
        return input + self.layers(input)


class Network(nn.Module):
    """Nine pairs, whose statistics are those of the images that it is given later."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_bn(3, 16, 3, stride=2), Inverted(16), *conv_bn(16, 32, 3, stride=2), Inverted(32), *conv_bn(32, 8, 1)
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.25)
                module.momentum = None
        with torch.no_grad():
            self(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))


class SideBySide(nn.Module):
    """Many networks, each with images of its own."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.networks = nn.ModuleList(Network(own) for own in images)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images[:, number]) for number, network in enumerate(self.networks)], 1)


class OneStep(BoringModule):
    """Keeps the features and the gradients of its only step."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = images(8, NETWORKS, 3, 32, 32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone = SideBySide(self.inputs.transpose(0, 1))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.inputs, images(8, NETWORKS, 4, seed=2)), batch_size=8)

    def forward(self, inputs: Tensor) -> Tensor:
        self.features = self.backbone(inputs)
        return self.head(self.features)

    def on_after_backward(self) -> None:
        self.features = self.features.detach().double().transpose(0, 1)
        self.gradients = [
            torch.cat([parameter.grad.double().flatten() for parameter in network.parameters()])
            for network in self.backbone.networks
        ]


class HalfFold(nn.Module):
    """What the package must not do: a convolution whose fold is computed in the precision that it runs in."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.conv.weight.dtype
        tensors = self.conv.weight, self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var
        weight, gamma, beta, mean, var = (tensor.to(dtype) for tensor in tensors)
        scale = gamma * (var + self.bn.eps).rsqrt()
        return self.conv._conv_forward(input, weight * scale[:, None, None, None], beta - mean * scale)


class FoldsInHalf(OneStep):
    """The same networks, folded by `HalfFold`."""

    def __init__(self) -> None:
        super().__init__()
        for conv, bn in find_conv_bn_pairs(self.backbone):
            pair = HalfFold(self.backbone.get_submodule(conv), self.backbone.get_submodule(bn).eval())
            self.backbone.set_submodule(conv, pair)
            self.backbone.set_submodule(bn, nn.Identity())


@cache
def first_step(precision: Any, mode: Any) -> tuple[Tensor, list[Tensor]]:
    """Run one step in a mode, or with a fold in half precision; return features and gradients."""
    module = FoldsInHalf() if mode == "half" else OneStep()
    callbacks = [] if mode == "half" else [quick(mode, eval_mode="eval", verify=False)]
    make_trainer(*callbacks, precision=precision, limit_val_batches=0).fit(module)
    return module.features, module.gradients


def errors(precision: str, mode: str) -> Errors:
    """Compare one step with Eval mode's in float64."""
    return Errors(
        *(
            torch.stack([(one - other).norm() / other.norm() for one, other in zip(found, exact, strict=True)])
            for found, exact in zip(first_step(precision, mode), first_step("64-true", "eval"), strict=True)
        )
    )


def surely_at_least(precision: str, mode: str) -> dict[str, float]:
    """The ratio to Eval mode's error that is exceeded but for chance.

    This is the lower end of a one-sided confidence interval, by Student's t, of the mean logarithm over all networks.
    """
    ratios = {}
    for name, ours, evals in zip(Errors._fields, errors(precision, mode), errors(precision, "eval"), strict=True):
        logs = (ours / evals).log()
        ratios[name] = math.exp(logs.mean() - STUDENT * logs.std() / NETWORKS**0.5)
    return ratios


def test_the_shifts_are_as_small_as_the_bound_supposes() -> None:
    module = OneStep()
    shares = []
    for pair in find_conv_bn_pairs(module.backbone):
        bn = module.backbone.get_submodule(pair.bn)
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        shift = bn.bias - bn.running_mean * scale
        shares.append(shift.square().mean() / (scale**2 * (bn.running_var + bn.running_mean**2)).mean())
    assert len(shares) == 9 * NETWORKS
    assert torch.stack(shares).mean() <= SHIFT


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_error_of_tune_is_evals(precision: str) -> None:
    """On a CPU Lightning takes bf16-mixed for 16-mixed, and says so."""
    if precision == "64-true":  # where Eval mode is what is compared with
        assert max(map(torch.max, errors(precision, "tune"))) < 1e-12
    else:
        found = surely_at_least(precision, "tune")
        assert max(found.values()) <= BOUND, found


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("16-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_a_fold_in_half_precision_would_be_noticed(precision: str) -> None:
    found = surely_at_least(precision, "half")
    assert max(found.values()) > BOUND, found


def test_the_docs_name_every_precision() -> None:
    names = {getattr(precision, "values", [precision])[0] for precision in PRECISIONS}
    assert names_that_work() >= names
