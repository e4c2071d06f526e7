"""The fuzzer itself: it sees planted mistakes of each kind, and makes what it finds small."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from fuzz import network, trial
from fuzz.drawing_scenarios import draw_scenario
from fuzz.interpreter import build
from fuzz.network import Action, Layer, Network, Scenario, Step
from fuzz.shrinking import shrunk
from fuzz.trial import try_scenario
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from lightning_convbn import ConvBNPairs

PAIR = Network(
    steps=(Step("call", (0,), "a"), Step("call", (1,), "b")), layers={"a": Layer("conv"), "b": Layer("norm")}
)
RECALL = Step("recall", (0,), name="tap")
Mistake = Callable[[nn.Module, Tensor, Tensor], Tensor]  # module, input and output of a forward -> a wrong output


def wrong_output(module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    return output * (1 + 1e-7)


def wrong_gradient(module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    weight = module.weight
    return output + (weight - weight.detach()).sum() * 1e-5


def wrong_input_gradient(module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    return output + (input - input.detach()).sum() * 1e-5


def written_input(module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    input.data.add_(1)
    return output


def drawn_number(module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    random.random()
    return output


def changed_flag(module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    module.training = not module.training
    return output


def written_parameter(module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    module.weight.data.mul_(1 + 1e-15)
    return output


MISTAKES: dict[str, Mistake] = {
    "output": wrong_output,
    "gradient": wrong_gradient,
    "input gradient": wrong_input_gradient,
    "given": written_input,
    "random state": drawn_number,
    "flags": changed_flag,
    "state_dict": written_parameter,
}


def plant(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every folded Conv2d make a mistake from its switch on."""
    right = trial.switch

    def switch(model: nn.Module, action: Action, pairs: ConvBNPairs | None) -> ConvBNPairs:
        chosen = right(model, action, pairs)
        for conv in [model.get_submodule(pair.conv) for pair in chosen if action.mode == "tune"]:
            if isinstance(conv, nn.Conv2d):
                conv.register_forward_hook(lambda module, args, output: mistake(module, args[0], output))
        return chosen

    monkeypatch.setattr(trial, "switch", switch)


def test_a_pair_is_folded_and_right() -> None:
    report = try_scenario(Scenario(PAIR, input_grad=True))
    assert report.wrong is None
    assert not report.ended
    assert (report.folded, report.runs) == (1, 1)


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_planted_mistake_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(MISTAKES[kind], monkeypatch)
    wrong = try_scenario(Scenario(PAIR, input_grad=kind == "input gradient")).wrong
    assert wrong is not None
    assert wrong.kind == kind


def test_a_planted_mistake_is_seen_in_a_random_network_and_shrunk_to_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    right = [seed for seed in range(15) if try_scenario(draw_scenario(seed)).wrong is None]
    plant(wrong_output, monkeypatch)
    seed = next(seed for seed in right if try_scenario(draw_scenario(seed)).wrong is not None)
    smallest = shrunk(draw_scenario(seed))
    assert [action.do for action in smallest.actions] == ["mode", "run"]
    assert len(smallest.network.steps) <= 2
    assert not smallest.network.hooks


def test_shrinking_keeps_what_makes_a_scenario_fail() -> None:
    def fails(scenario: Scenario) -> bool:
        deploys = any(action.mode == "deploy" for action in scenario.actions)
        return deploys and any(step.op == "function" for step in scenario.network.steps)

    seed = next(seed for seed in range(100) if fails(draw_scenario(seed)))
    smallest = shrunk(draw_scenario(seed), fails)
    assert [action.mode for action in smallest.actions] == ["deploy"]
    assert [step.op for step in smallest.network.steps] == ["function"]
    assert not smallest.network.layers


def test_a_scenario_that_does_not_fail_can_not_be_shrunk() -> None:
    with pytest.raises(ValueError, match=r"scenario does not fail: Scenario\("):
        shrunk(Scenario(PAIR))


def test_a_printed_scenario_is_the_scenario() -> None:
    for seed in range(20):
        scenario = draw_scenario(seed)
        assert eval(repr(scenario), vars(network)) == scenario


def test_many_seeds_draw_a_scenario() -> None:
    assert len([draw_scenario(seed) for seed in range(3700, 3800)]) == 100


def test_a_block_recalls_its_input_where_the_step_that_keeps_another_value_is_skipped() -> None:
    body = Network((Step("function", (0,), name="tanh"), Step("keep", (1,), guard="shape", name="tap"), RECALL))
    network = Network((Step("call", (0,), "c"),), {"c": Layer("block", body=body)})
    x = torch.rand(3, 2, 5, 5)
    model = build(network)
    assert torch.equal(model(x), torch.tanh(x))
    assert torch.equal(model(x[:2]), x[:2])


def test_an_error_of_plain_pytorch_ends_a_scenario() -> None:
    network = Network(steps=(Step("function", name="tanh"), Step("function", (1,), name="mul_")))
    report = try_scenario(Scenario(network, actions=(Action("run"),), input_grad=True))
    assert report.wrong is None
    assert "modified by an inplace operation" in report.ended


def test_a_checkpoint_that_goes_another_way_the_second_time_fails_in_eval_mode_by_itself() -> None:
    """So networks here get Python's random numbers again, as `fuzz.operations.checkpointed` says."""
    conv, bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3).eval()
    ways = iter([True, False])

    def block(x: Tensor) -> Tensor:
        y = conv(x)
        return nn.functional.elu(bn(y) if next(ways) else y)

    output = checkpoint(block, torch.ones(2, 3, 4, 4), use_reentrant=False)
    with pytest.raises(CheckpointError, match="A different number of tensors was saved"):
        output.sum().backward()
