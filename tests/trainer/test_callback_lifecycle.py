"""What the callback leaves behind when a run ends badly, and how it lives with other callbacks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    LIGHTNING_SAYS,
    BoringModule,
    FindsBatchSize,
    Snapshot,
    differing,
    half_in_eval,
    make_trainer,
    quick,
    state_of,
    statistics_of,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder
from torch import Tensor

from lightning_convbn import set_mode

pytestmark = LIGHTNING_SAYS

EMAWeightAveraging = getattr(lightning.pytorch.callbacks, "EMAWeightAveraging", None)
needs_finder_that_goes_on = pytest.mark.skipif(
    EMAWeightAveraging is None, reason="the run that Lightning 2.5's learning-rate finder prepares ends with it"
)
needs_averaging = pytest.mark.skipif(EMAWeightAveraging is None, reason="EMAWeightAveraging came with Lightning 2.6")


def make_raise(owner: Any, hook: str, error: BaseException) -> None:
    def raising(*args: Any, **kwargs: Any) -> None:
        raise error

    setattr(owner, hook, raising)


def assert_fits_in_tune(module: BoringModule, *callbacks: Any, plain: Snapshot) -> None:
    """A new Trainer trains in Tune mode, and nothing is left of it either."""
    module.forget()
    statistics, weight = statistics_of(module), module.backbone.last[0].weight.detach().clone()
    make_trainer(*callbacks).fit(module)
    assert module.modes == {"fit": ["tune"] * BATCHES_PER_EPOCH, "validate": ["deploy"]}
    assert differing(statistics_of(module), statistics) == []
    assert not torch.equal(module.backbone.last[0].weight, weight)
    assert Snapshot.of(module) == plain


FIT_HOOKS = """
setup configure_optimizers on_fit_start train_dataloader val_dataloader on_train_start on_train_epoch_start
on_train_batch_start training_step optimizer_step on_train_batch_end on_validation_model_eval on_validation_start
validation_step on_validation_end on_validation_model_train on_train_epoch_end on_train_end on_fit_end teardown
"""
MODULE_HOOKS = {
    "fit": FIT_HOOKS.split(),
    "validate": ["on_validation_model_eval", "validation_step", "on_validation_end"],
    "test": ["on_test_start", "test_step", "on_test_end"],
    "predict": ["on_predict_start", "predict_step", "on_predict_end", "teardown"],
}
ALWAYS = {"setup", "on_train_batch_start", "training_step", "validation_step", "test_step", "predict_step"}
CALLBACK_HOOKS = ["on_fit_start", "on_train_batch_start", "on_validation_start", "on_validation_batch_end", "teardown"]


@pytest.mark.parametrize(
    ("stage", "hook"),
    [
        pytest.param(stage, hook, marks=[] if hook in ALWAYS else pytest.mark.slow)
        for stage, hooks in MODULE_HOOKS.items()
        for hook in hooks
    ],
)
def test_an_error_in_a_hook_of_the_module_leaves_it_plain(stage: str, hook: str) -> None:
    """With the flags that it had, and the same callback can be used again."""
    module, callback = half_in_eval(), quick()
    before = Snapshot.of(module)
    make_raise(module, hook, RuntimeError("boom"))
    trainer = make_trainer(callback)
    with pytest.raises(RuntimeError, match="boom"):
        getattr(trainer, stage)(module)
    assert Snapshot.of(module) == before
    delattr(module, hook)
    assert_fits_in_tune(module, callback, plain=before)


@pytest.mark.parametrize("hook", CALLBACK_HOOKS)
def test_an_error_in_another_callback_leaves_the_module_plain(hook: str) -> None:
    """Also where it comes between a hook of ours and the forward that the hook has prepared."""
    module, callback, other = half_in_eval(), quick(), Callback()
    before = Snapshot.of(module)
    make_raise(other, hook, RuntimeError("boom"))
    trainer = make_trainer(other, callback)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module)
    assert Snapshot.of(module) == before
    assert_fits_in_tune(module, callback, plain=before)


@pytest.mark.parametrize("calls", [1, 2, 3, 4], ids="forward_{}".format)
def test_an_error_in_the_forward_of_the_target_leaves_it_plain(calls: int) -> None:
    """The first two are those of the verification."""
    module, callback = half_in_eval(), quick()
    before, forward, left = Snapshot.of(module), module.backbone.dropout.forward, iter(range(calls - 1))

    def out_of_luck(features: Tensor) -> Tensor:
        if next(left, None) is None and not isinstance(features, torch.fx.Proxy):
            raise RuntimeError("boom")
        return forward(features)

    module.backbone.dropout.forward = out_of_luck
    trainer = make_trainer(callback)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module)
    del module.backbone.dropout.forward
    assert Snapshot.of(module) == before
    assert_fits_in_tune(module, callback, plain=before)


def test_an_error_in_a_later_run_does_not_bring_back_the_flags_of_an_earlier_one() -> None:
    """It comes before our ``setup``, when the flags on record are those of the run before."""
    module, callback = BoringModule(), quick()
    make_raise(module, "training_step", RuntimeError("boom"))
    trainer = make_trainer(callback)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module)
    module.eval()
    make_raise(module, "prepare_data", RuntimeError("too early"))
    trainer = make_trainer(callback)
    with pytest.raises(RuntimeError, match="too early"):
        trainer.fit(module)
    assert not any(child.training for child in module.modules())


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl-C from the first one on, for the rest of the process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("stage", "hook"),
    [("fit", "training_step"), ("fit", "validation_step"), ("predict", "predict_step")],
)
def test_ctrl_c_leaves_the_module_plain(stage: str, hook: str) -> None:
    module, callback = half_in_eval(), quick()
    before = Snapshot.of(module)
    make_raise(module, hook, KeyboardInterrupt())
    trainer = make_trainer(callback)
    with pytest.raises(SystemExit):
        getattr(trainer, stage)(module)
    assert Snapshot.of(module) == before
    delattr(module, hook)
    assert_fits_in_tune(module, callback, plain=before)


# ------------------------------------------------------------------------------------------- a stale conversion


@pytest.mark.parametrize("mode", ["eval", "deploy"])
def test_a_module_that_was_left_converted_is_plain_after_a_fit(mode: Any) -> None:
    """Somebody else's conversion, or that of a callback that is gone."""
    module = half_in_eval()
    before = Snapshot.of(module)
    set_mode(module.backbone, mode)
    assert_fits_in_tune(module, quick(), plain=before)


@pytest.mark.parametrize("same", [True, False], ids=["same_callback", "new_callback"])
def test_an_error_while_a_finder_tries_is_repaired_by_the_next_fit(tmp_path: Path, same: bool) -> None:
    """The finder has taken the callbacks away, so that none of them hears of the error."""
    module, callback = half_in_eval(), quick()
    before = Snapshot.of(module)
    make_raise(module, "training_step", RuntimeError("boom"))
    trainer = make_trainer(LearningRateFinder(num_training_steps=2), callback, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module)
    del module.training_step
    assert_fits_in_tune(module, callback if same else quick(), plain=before)


# ---------------------------------------------------------------------------------------------- other callbacks


@pytest.mark.filterwarnings("ignore:Failed to compute suggestion for learning rate")
@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize(
    ("finder", "arguments"),
    [
        pytest.param(
            LearningRateFinder, {"num_training_steps": 4, "early_stop_threshold": None}, marks=needs_finder_that_goes_on
        ),
        (BatchSizeFinder, {"max_trials": 2, "steps_per_trial": 2}),
    ],
)
def test_what_a_finder_tries_is_tune_mode(
    tmp_path: Path, finder: Any, arguments: dict[str, Any], ours_first: bool
) -> None:
    module = FindsBatchSize()
    before = Snapshot.of(module)
    callbacks = [quick(), finder(**arguments)]
    make_trainer(*(callbacks if ours_first else callbacks[::-1]), default_root_dir=tmp_path).fit(module)
    assert len(module.modes["fit"]) > len(module.train_dataloader())
    assert set(module.modes["fit"]) == {"tune"}
    assert module.modes["validate"][-1] == "deploy"
    assert Snapshot.of(module) == before


class KeepsValidation(BoringModule):
    """Keeps what validation saw and said at its end."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen, self.said = state_of(self), self(batch[0])


@needs_averaging
@pytest.mark.parametrize(("ours_first", "val_check_interval"), [(False, 1.0), (True, 2)])
def test_validation_sees_averaged_weights_folded(ours_first: bool, val_check_interval: float) -> None:
    """They are put in place after our ``on_validation_start``, and without a trace in the tensors' versions."""
    module = KeepsValidation()
    before = Snapshot.of(module)
    callbacks = [quick(), EMAWeightAveraging(decay=0.5)]
    callbacks = callbacks if ours_first else callbacks[::-1]
    make_trainer(*callbacks, max_epochs=2, val_check_interval=val_check_interval).fit(module)
    assert module.modes["fit"] == ["tune"] * 2 * BATCHES_PER_EPOCH
    assert set(module.modes["validate"]) == {"deploy"}

    averaged = BoringModule().eval()
    averaged.load_state_dict(module.seen)
    images, _ = next(iter(module.val_dataloader()))
    torch.testing.assert_close(module.said, averaged(images))
    if val_check_interval == 1.0:  # the last validation is at the very end, and the averages are what remains
        assert differing(state_of(module), module.seen) == []
    assert Snapshot.of(module) == before


class StartsWithTheHead(BoringModule):
    """Keeps a weight of the backbone at the start of every epoch, and trains the head only, unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def on_train_epoch_start(self) -> None:
        self.weights.append(self.backbone.last[0].weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=self.learning_rate)


def test_a_backbone_that_is_frozen_at_first_is_trained_in_tune_mode_later() -> None:
    """Lightning's freezing puts BatchNorms into a state in which plain PyTorch would use the batch's statistics."""
    module = StartsWithTheHead()
    statistics = statistics_of(module)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)
    make_trainer(finetuning, quick(), max_epochs=2).fit(module)
    assert module.modes["fit"] == ["tune"] * 2 * BATCHES_PER_EPOCH
    assert torch.equal(*module.weights)
    assert not torch.equal(module.weights[1], module.backbone.last[0].weight)
    assert differing(statistics_of(module), statistics) == []
