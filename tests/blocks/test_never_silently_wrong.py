"""Traps for a forward that runs twice: the result is that of one run, or an error says what changed in between."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers.blocks import Residual, Tower, batch, step_results
from helpers.recomputation import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_convbn import conv_bn_mode, get_mode, recomputed_blocks, set_mode
from lightning_convbn.blocks import reasons


class Between(nn.Module):
    """Does something in the middle of a block. What it needs is made by `start`."""

    def __init__(self, start: Callable[[nn.Module], None], run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        start(self)
        self.function = run

    def forward(self, input: Tensor) -> Tensor:
        return self.function(self, input)


def nothing(module: Any) -> None:
    pass


def attribute(name: str, make: Callable[[], Any]) -> Callable[[Any], None]:
    """A start that sets an attribute."""
    return lambda module: setattr(module, name, make())


def follows_average(module: Any, input: Tensor) -> Tensor:
    module.average = module.average * 0.5 + input.detach().abs().mean()
    return input / module.average


def counts(module: Any, input: Tensor) -> Tensor:
    module.count += 1
    return input / module.count


def appends(module: Any, input: Tensor) -> Tensor:
    module.seen.append(1)
    return input / len(module.seen)


def writes_a_view(module: Any, input: Tensor) -> Tensor:
    module.table[0][1].add_(1.0)
    return input * module.table[0].sum()


STATES: dict[str, tuple[Any, Any]] = {
    "an attribute is replaced": (attribute("average", lambda: torch.ones(())), follows_average),
    "a buffer is replaced": (lambda module: module.register_buffer("average", torch.ones(())), follows_average),
    "a number is counted up": (attribute("count", int), counts),
    "a list grows": (attribute("seen", list), appends),
    "a view of an attribute is written": (attribute("table", lambda: [torch.zeros(4)]), writes_a_view),
}
MAKES: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(0),
    "random": lambda: {"own": random.Random(0)},
    "numpy": lambda: np.random.default_rng(0),
    "of nobody": lambda: None,
}
DRAWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "torch": lambda module, input: input + torch.rand(input.shape, generator=module.generator),
    "random": lambda module, input: input * module.generator["own"].random(),
    "numpy": lambda module, input: input * float(module.generator.random()),
    "of nobody": lambda module, input: input + torch.rand(input.shape, generator=SHARED),
}
SHARED = torch.Generator()


def tower(start: Any = nothing, run: Any = lambda module, input: input) -> Tower:
    return Tower(lambda: Residual(between=lambda: Between(start, run))).train()


@pytest.mark.parametrize("trap", STATES)
def test_state_changes_once(trap: str) -> None:
    plain, model = tower(*STATES[trap]), tower(*STATES[trap])
    for _ in range(2):
        assert_same_bits(step_results(model, "blocks"), step_results(plain, "none"))
    assert all(reason.startswith("writes") for reason in recomputed_blocks(model).left_out.values())
    assert not recomputed_blocks(model).names


@pytest.mark.parametrize("trap", DRAWS)
def test_a_generator_of_its_own_draws_once(trap: str) -> None:
    results = []
    for recompute in ("none", "blocks"):
        SHARED.manual_seed(0)
        model = tower(attribute("generator", MAKES[trap]), DRAWS[trap])
        results.append(step_results(model, recompute))
    assert_same_bits(*results)
    assert set(recomputed_blocks(model).left_out.values()) == {reasons.DRAWS}


SCHEDULES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a rate": lambda module, input: F.dropout(input, module.rate),
    "a branch": lambda module, input: F.dropout(input) if module.rate else input,
    "a shape": lambda module, input: F.dropout(input) if input.shape[-1] > 8 else input,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_draws_only_later_draws_the_same_twice(schedule: str) -> None:
    def gradients(recompute: Any) -> list[Tensor]:
        model, found = tower(attribute("rate", float), SCHEDULES[schedule]), []
        set_mode(model, "tune", recompute=recompute)
        for rate, size in ((0.0, 8), (0.5, 12)):
            for module in model.modules():
                if isinstance(module, Between):
                    module.rate = rate
            torch.manual_seed(0)
            output = model(F.interpolate(batch(), size))
            found += torch.autograd.grad(output.sum(), [*model.parameters()])
        return found

    assert_same_bits(gradients("blocks"), gradients("none"))


def test_a_hook_that_draws_draws_the_same_twice() -> None:
    def results(recompute: Any) -> list[Tensor]:
        model = tower()
        for block in model.blocks:
            block.between.register_forward_hook(lambda module, args, output: F.dropout(output))  # type: ignore[union-attr]
        return step_results(model, recompute)

    assert_same_bits(results("blocks"), results("none"))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.spectral_norm. is deprecated")
def test_a_hook_in_front_of_a_layer_runs_once() -> None:
    def results(recompute: Any) -> list[Tensor]:
        model = Tower(lambda: Residual(between=lambda: torch.nn.utils.spectral_norm(nn.Conv2d(6, 6, 1)))).train()
        found = step_results(model, recompute)
        assert recompute == "none" or set(recomputed_blocks(model).left_out.values()) == {reasons.HOOKED}
        return found

    assert_same_bits(results("blocks"), results("none"))


def weight_of(model: Tower) -> Any:
    return model.blocks[1].conv2.weight  # type: ignore[union-attr]


WRITES: dict[str, Callable[[Tower], Any]] = {
    "scaled": torch.no_grad()(lambda model: weight_of(model).mul_(2)),
    "replaced": lambda model: setattr(model.blocks[1].conv2, "weight", nn.Parameter(2 * weight_of(model))),
    "other data": lambda model: setattr(weight_of(model), "data", 2 * weight_of(model).data),
    "loaded": lambda model: model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_forward_and_backward_is_an_error(write: str) -> None:
    model = Tower()
    set_mode(model, "tune", recompute="blocks")
    output = model(batch())
    WRITES[write](model)
    with pytest.raises(RuntimeError, match="was written or replaced|modified by an inplace operation"):
        output.sum().backward()
    model(batch()).sum().backward()


def test_parameters_that_stand_in_for_one_call_are_an_error_afterwards() -> None:
    model = Tower()
    set_mode(model, "tune", recompute="blocks")
    others = {name: (1.5 * tensor).detach().requires_grad_() for name, tensor in model.named_parameters()}
    output = torch.func.functional_call(model, others, (batch(),))
    with pytest.raises(RuntimeError, match="written or replaced"):
        output.sum().backward()


class WithAttributes(Residual):
    """Its attributes have the names that ours have on layers."""

    def __init__(self) -> None:
        super().__init__()
        self._fold, self._check, self._bn = 3.0, True, "mine"

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self._fold if self._check and self._bn else input


def test_attributes_of_a_block_stay_its_own() -> None:
    model, plain = Tower(WithAttributes), Tower(WithAttributes)
    assert_same_bits(step_results(model, "blocks"), step_results(plain, "none"))
    assert recomputed_blocks(model).names
    set_mode(model, "train")
    assert (model.blocks[0]._fold, model.blocks[0]._check, model.blocks[0]._bn) == (3.0, True, "mine")


class Registered(Residual):
    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()


def test_a_class_that_forbids_others_runs_again() -> None:
    model = Tower(Registered)
    set_mode(model, "tune", recompute="blocks")
    assert len(recomputed_blocks(model).names) == 3


@contextmanager
def surgery(model: Tower) -> Iterator[None]:
    yield
    del model.blocks[2]


def test_the_context_manager_brings_back_what_is_left() -> None:
    model = Tower()
    set_mode(model, "tune", recompute="blocks")
    with conv_bn_mode(model, "eval"), surgery(model):
        pass
    assert get_mode(model) == "tune"
    assert recomputed_blocks(model).names == ("blocks.0", "blocks.1")


def test_a_block_that_is_made_anew_by_its_class_is_plain() -> None:
    model = Tower()
    set_mode(model, "tune", recompute="blocks")
    made = type(model.blocks[0])()
    input = torch.ones(1, 6, 4, 4)
    assert made.eval()(input).shape == input.shape
