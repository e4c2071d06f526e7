"""The hook on an MMEngine Runner: its losses are Eval mode's and those of MMEngine's own switch, at less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_training import Snapshot, pretend_trained, statistics_of

from examples.templates.mmengine_hook import ConvBNModeHook, DigitNet, Recorder, digits, train
from lightning_convbn import get_mode

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:mmengine")


def run(name: str, *hooks: Any, norm_eval: bool = False, **config: Any) -> tuple[DigitNet, Recorder]:
    """Train a network that looks pretrained on the digits 5 and 6."""
    torch.manual_seed(0)
    model = DigitNet(norm_eval).double()
    pretend_trained(model)
    data = digits(5, 7)
    data.dataset.tensors = (data.dataset.tensors[0].double(), *data.dataset.tensors[1:])
    return model, train(model, data, *hooks, name=name, config=config)


def test_losses_and_weights_are_evals_and_mmengines_at_less_memory() -> None:
    evaluated, eval_run = run("eval", norm_eval=True)
    theirs, their_run = run("theirs", norm_eval=True, efficient_conv_bn_eval=["backbone"])
    ours, our_run = run("ours", {"type": "ConvBNModeHook", "target": "backbone"})
    assert len(our_run.losses) > 10
    assert our_run.losses[-1] < 0.7 * our_run.losses[0]
    assert our_run.kept_bytes < their_run.kept_bytes < 0.6 * eval_run.kept_bytes
    for model, recorder in ((evaluated, eval_run), (theirs, their_run)):
        assert our_run.losses == pytest.approx(recorder.losses, rel=1e-9)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-8, atol=1e-10)


def test_eval_mode_by_the_hook() -> None:
    _, expected = run("eval by the backbone", norm_eval=True)
    _, found = run("eval by the hook", ConvBNModeHook("eval", "backbone"))
    assert found.losses == expected.losses
    assert found.kept_bytes == expected.kept_bytes


def test_gives_back_plain_modules_with_frozen_statistics() -> None:
    modes = []

    class Looks(Recorder):
        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            modes.append(get_mode(runner.model))

    torch.manual_seed(0)
    model = DigitNet().train()
    pretend_trained(model)
    before, statistics = Snapshot.of(model), statistics_of(model)
    train(model, digits(5, 6), ConvBNModeHook(target=""), Looks(), name="given back")
    assert set(modes) == {"tune"}
    assert Snapshot.of(model) == before
    for name, buffer in statistics_of(model).items():
        assert torch.equal(buffer, statistics[name]), name
