"""What a look at a block shows, and that a block which can't run twice runs once, with a reason."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.blocks import Residual, Tower, batch, count_calls, step_results
from helpers.recomputation import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_convbn import find_conv_bn_pairs, recomputed_blocks, set_mode
from lightning_convbn.blocks import reasons


class WritesInput(Residual):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.relu(input, inplace=True))


class CountsSteps(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(input)


class RemembersMean(Residual):
    """In an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.means = {"last": torch.zeros(())}

    def forward(self, input: Tensor) -> Tensor:
        self.means["last"].copy_(input.detach().mean())
        return super().forward(input)


class ReadsValues(Residual):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.mean() > -100 else input


class SkipsAtRandom(Residual):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if random.random() < 2 else input


class Normalises(Residual):
    """Trains a statistic that is neither a BatchNorm's nor declared as written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(6))
        self.register_buffer("spread", torch.ones(6))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.batch_norm(input, self.center, self.spread, training=True))


REFUSED: dict[type[Residual], str] = {
    WritesInput: reasons.WRITES_INPUT,
    CountsSteps: reasons.WRITES_STATE.format(name="steps"),
    RemembersMean: reasons.WRITES_STATE.format(name="means"),
    Normalises: reasons.WRITES_STATE.format(name="center"),
    ReadsValues: "can't run on tensors without data",
    SkipsAtRandom: reasons.DRAWS,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_block_that_can_not_run_twice_runs_once_and_says_why(kind: type[Residual]) -> None:
    plain, model = Tower(kind), Tower(kind)
    for tower in (plain, model):  # one of the kinds can't be traced
        set_mode(tower, "tune", pairs=find_conv_bn_pairs(tower, example_inputs=(batch(),)))
    random.seed(0)
    expected = step_results(plain, "none")
    calls = count_calls(model.blocks[0].between)  # type: ignore[arg-type]
    random.seed(0)
    assert_same_bits(step_results(model, "blocks"), expected)
    assert len(calls) == 1
    blocks = recomputed_blocks(model)
    assert blocks.names == ()
    assert [*blocks.left_out] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(reason.startswith(REFUSED[kind]) for reason in blocks.left_out.values()), blocks.left_out


@pytest.mark.parametrize("given", ["a tensor", "a flag", "a dict", "an object"])
def test_what_a_block_may_be_given(given: str) -> None:
    class Options:
        scale = 2.0

    class Takes(Residual):
        def forward(self, input: Any, options: Any = None, *, scale: Any = None) -> Any:
            tensor = input["features"] if isinstance(input, dict) else input
            return super().forward(tensor * (options.scale if options else 1) * (1 if scale is None else scale))

    class Gives(Tower):
        def run(self, block: nn.Module, input: Tensor) -> Any:
            arguments: dict[str, tuple[list[Any], dict[str, Any]]] = {
                "a tensor": ([input], {"scale": input.mean()}),
                "a flag": ([input], {"scale": 0.5}),
                "a dict": ([{"features": input, "name": "x"}], {}),
                "an object": ([input, Options()], {}),
            }
            args, kwargs = arguments[given]
            return block(*args, **kwargs)

    model = Gives(Takes)
    assert_same_bits(step_results(model, "blocks"), step_results(Gives(Takes), "none"))
    left_out = recomputed_blocks(model).left_out
    assert {*left_out.values()} == ({reasons.TAKES.format(cls="Options")} if given == "an object" else set())


def test_a_list_may_be_changed_by_the_block_and_afterwards() -> None:
    """As in HRNet, whose blocks change the list that they get, and in DenseNet, which appends to it."""

    class Takes(Residual):
        def forward(self, inputs: Any) -> Any:
            inputs[0] = super().forward(inputs[0])
            return {"list": inputs, "sum": sum(inputs)}

    class Gives(Tower):
        def run(self, block: nn.Module, input: Tensor) -> Any:
            features = [input, input.sin()]
            output = block(features)
            assert output["list"] is features
            features.append(output["sum"])
            return torch.stack(features).sum(0)

    model = Gives(Takes)
    assert_same_bits(step_results(model, "blocks"), step_results(Gives(Takes), "none"))
    assert recomputed_blocks(model).left_out == {}


def test_a_look_leaves_no_trace() -> None:
    """No hook runs, no attribute, random state or training flag changes; the look is there only after a step."""
    model = Tower(lambda: Residual(between=lambda: nn.Dropout(0.5)))
    calls = count_calls(model.blocks[0].between)  # type: ignore[arg-type]
    set_mode(model, "tune", recompute="blocks")
    model(batch())
    assert len(calls) == 1
