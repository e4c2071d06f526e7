"""Statistics of a frozen model never move: whoever has them, whoever computes with them, whoever sets the flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.comparing import assert_close
from helpers.networks import Net, images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from lightning_convbn import Mode, set_mode

FROZEN: tuple[Mode, ...] = ("eval", "tune", "deploy")


class ActivatedNorm(nn.Module):
    """As inplace_abn's: a BatchNorm by what it has and computes, and by no base class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.leaky_relu(F.batch_norm(input, mean, var, self.weight, self.bias, self.training))


class WritesItsAverages(ActivatedNorm):
    """Keeps its averages in Python."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        if self.training:
            batch = input.detach().transpose(0, 1).flatten(1)
            mean.lerp_(batch.mean(1), 0.1)
            var.lerp_(batch.var(1), 0.1)
        return F.batch_norm(input, mean, var, self.weight, self.bias)


class OfTheCommonBase(_NormBase):
    """Shares PyTorch's base of norms, and not that of BatchNorms."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, training=self.training)


def called(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x))  # type: ignore[no-any-return]


def computes_with_its_norm(net: Net, x: Tensor) -> Tensor:
    """Never calls its norm: it takes the buffers and the flag."""
    bn = net.bn
    return F.batch_norm(net.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training)


def averages_for_its_norm(net: Net, x: Tensor) -> Tensor:
    """Writes the averages itself while the flag of its norm says so."""
    output, bn = net.conv(x), net.bn
    if bn.training:
        with torch.no_grad():
            bn.running_mean.lerp_(output.mean((0, 2, 3)), 0.1)
    return F.batch_norm(output, bn.running_mean, bn.running_var)


MODELS: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[], nn.Module]]] = {
    "BatchNorm2d": (called, lambda: nn.BatchNorm2d(8)),
    "InstanceNorm2d": (called, lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "by what it has": (called, lambda: ActivatedNorm(8)),
    "by what it has, inherited": (called, lambda: WritesItsAverages(8)),
    "of the common base": (called, lambda: OfTheCommonBase(8)),
    "the parent computes": (computes_with_its_norm, lambda: nn.BatchNorm2d(8)),
    "the parent computes, by what it has": (computes_with_its_norm, lambda: ActivatedNorm(8)),
    "the parent averages": (averages_for_its_norm, lambda: nn.BatchNorm2d(8)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    forward, make_norm = MODELS[name]
    model = Net(forward, conv=nn.Conv2d(3, 8, 3), bn=make_norm()).double().train()
    model.bn.running_mean.normal_()  # type: ignore[operator, union-attr]
    model.bn.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    return model


def run(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    output = model(images(4, 3, 8, 8, dtype=torch.float64))
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [output.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_frozen_or_listed(name: str, mode: Mode) -> None:
    plain, model = build(name).eval(), build(name)
    expected = run(plain)
    pairs = set_mode(model, mode)
    assert ("conv", "bn") in pairs or pairs.unpaired["bn"]
    assert not pairs.unfrozen
    for _ in range(2):
        model.train()
        assert_close(run(model), expected, 1e-9)
    set_mode(model, "train")
    assert model.bn.training
    before = model.bn.running_mean.clone()  # type: ignore[operator, union-attr]
    run(model)
    assert not torch.equal(model.bn.running_mean, before)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- flags


class Nested(nn.Module):
    """A pair and a lone norm, a level below, with mixed flags."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        self.train()
        self.body[3].eval()

    def forward(self, input: Tensor) -> Tensor:
        return self.body(input)  # type: ignore[no-any-return]


def assign(model: Any, flag: bool) -> None:
    for module in model.modules():
        module.training = flag


ASKED: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "train the model": lambda model: model.train(),
    "eval the model": lambda model: model.eval(),
    "train, then eval": lambda model: model.train().eval(),
    "eval, then train": lambda model: model.eval().train(),
    "train a part": lambda model: model.body.train(),
    "eval the norm": lambda model: model.body[1].eval(),
    "train the other norm": lambda model: model.body[3].train(),
    "eval the model, train a norm": lambda model: (model.eval(), model.body[1].train()),
    "train the model, eval a norm": lambda model: (model.train(), model.body[1].eval()),
    "assign True": lambda model: assign(model, True),
    "eval the model, assign True": lambda model: (model.eval(), assign(model, True)),
    "assign True to a norm, eval the model": lambda model: (setattr(model.body[3], "training", True), model.eval()),
    "train(False) by apply": lambda model: model.apply(lambda module: module.train(False)),
}


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("asked", ASKED)
def test_a_restored_module_has_the_flag_that_was_asked_for_last(asked: str, mode: Mode) -> None:
    model, plain = Nested(), Nested()
    set_mode(model, mode)
    for net in (model, plain):
        ASKED[asked](net)
    model(images(2, 3, 8, 8))
    set_mode(model, "eval")
    set_mode(model, mode)
    set_mode(model, "train")
    assert [module.training for module in model.modules()] == [module.training for module in plain.modules()]


@pytest.mark.parametrize("mode", FROZEN)
def test_the_flag_of_a_frozen_norm_is_false_and_the_others_are_as_asked(mode: Mode) -> None:
    model = Nested()
    set_mode(model, mode)
    for flag in (True, False, True):
        model.train(flag)
        model(images(2, 3, 8, 8))
        flags = {name: module.training for name, module in model.named_modules()}
        assert flags == {"": flag, "body": flag, "body.0": flag, "body.1": False, "body.2": flag, "body.3": False}
