"""Another Trainer within a hook of a run: the outer run goes on as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    LIGHTNING_SAYS,
    BoringModule,
    PrintedLines,
    Snapshot,
    differing,
    make_trainer,
    quick,
    statistics_of,
)
from torch import nn

from lightning_convbn import ConvBNModeCallback, get_mode

pytestmark = LIGHTNING_SAYS


class Probe(BoringModule):
    """A head of its own over the backbone of another module. It does not train the backbone."""

    learning_rate = 0.0

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(lambda: backbone)


class Outer(BoringModule):
    """Runs something once, in one of its hooks, in its first epoch."""

    def __init__(self, hook: str, act: Callable[[Any], Any]) -> None:
        super().__init__()
        own, acted = getattr(self, hook), []

        def called(*args: Any) -> Any:
            if not acted:
                acted.append(hook)
                act(self)
            return own(*args)

        setattr(self, hook, called)


def run_outer(hook: str, act: Callable[[Any], Any], **arguments: Any) -> tuple[Outer, str]:
    module, lines = Outer(hook, act), PrintedLines()
    module.double()
    before, statistics = Snapshot.of(module), statistics_of(module)
    make_trainer(ConvBNModeCallback(**arguments), lines, max_epochs=2, precision="64-true").fit(module)
    assert module.modes["fit"] == ["tune"] * 2 * BATCHES_PER_EPOCH
    assert module.modes["validate"] == ["deploy"] * 2
    assert differing(statistics_of(module), statistics) == []
    assert Snapshot.of(module) == before
    return module, lines.text


HOOKS = [
    "on_train_epoch_start",
    "on_train_batch_start",
    "training_step",
    "validation_step",
    "on_train_epoch_end",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_run_over_the_same_backbone_within_a_hook_leaves_the_outer_run_as_it_was(stage: str, hook: str) -> None:
    """Its modes, its statistics, its losses, and what its first batch is watched for."""

    def probe(module: Outer) -> None:
        within = Probe(module.backbone)
        getattr(make_trainer(quick("eval", eval_mode="eval"), precision="64-true"), stage)(within)
        assert set(within.modes["fit"] + within.modes["validate"]) == {"eval"}

    expected, _ = run_outer(hook, lambda module: None)
    module, table = run_outer(hook, probe)
    assert module.losses == expected.losses
    assert table.count("verified: Tune equals Eval") == 1
    assert table.count("kept for backward") == 1


def test_a_plan_for_a_budget_goes_on_after_a_run_within() -> None:
    """The run within is no forward of the outer run: it has a plan of its own, or none."""

    def probe(module: Outer) -> None:
        make_trainer(quick(eval_mode="tune"), precision="64-true").fit(Probe(module.backbone))

    module, table = run_outer("on_train_batch_start", probe, memory_budget="1GiB")
    assert table.count("predicted peak of a step") == 1
    assert get_mode(module) == "train"


def test_a_run_within_that_fails_leaves_the_outer_run_as_it_was() -> None:
    def probe(module: Outer) -> None:
        within = Probe(module.backbone)
        within.training_step = lambda *args: 1 / 0
        with pytest.raises(ZeroDivisionError):
            make_trainer(quick(), precision="64-true").fit(within)

    run_outer("training_step", probe)


def test_runs_within_runs() -> None:
    def probe(module: Outer) -> None:
        def another(inner: Any) -> None:
            make_trainer(quick(eval_mode="eval"), precision="64-true").validate(Probe(module.backbone))

        inner = Outer("validation_step", another)
        inner.backbone = module.backbone
        make_trainer(quick(eval_mode="tune"), precision="64-true").validate(inner)
        assert inner.modes["validate"] == ["tune"]

    run_outer("training_step", probe)


def test_one_callback_in_two_trainers_at_once_is_refused() -> None:
    """And the outer run goes on, if the user catches that."""
    callback = quick()

    def probe(module: Outer) -> None:
        trainer = make_trainer(callback)
        with pytest.raises(ValueError, match="this ConvBNModeCallback is at work in another Trainer, .*; give each"):
            trainer.validate(Probe(module.backbone))

    module = Outer("on_train_batch_end", probe)
    make_trainer(callback, max_epochs=2).fit(module)
    assert module.modes["fit"] == ["tune"] * 2 * BATCHES_PER_EPOCH
