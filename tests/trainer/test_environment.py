"""The callback by the variable LIGHTNING_CONVBN: when it comes, when it stays away, and what it costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
from helpers.run_script import type_in
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    LIGHTNING_SAYS,
    BoringModule,
    Snapshot,
    make_trainer,
    module_of,
    quick,
    with_fresh_norm,
)
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_convbn import ConvBNModeCallback
from lightning_convbn.environment import MODES

pytestmark = [*LIGHTNING_SAYS, pytest.mark.usefixtures("installed")]


def ours(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ConvBNModeCallback)]


class Subclass(ConvBNModeCallback):
    """A user's own."""


class Given(BoringModule):
    """A module that brings its callback."""

    def configure_callbacks(self) -> list[Any]:
        return [quick("eval")]


# ----------------------------------------------------------------------------------------------- when it comes


@pytest.mark.parametrize(
    ("mode", "package"), [*((mode, lightning.pytorch) for mode in MODES), ("tune", pytorch_lightning)]
)
def test_variable_sets_the_mode(mode: str, package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_CONVBN", mode)
    module = module_of(package)
    before = Snapshot.of(module)
    trainer = make_trainer(trainer_class=package.Trainer, num_sanity_val_steps=1)
    trainer.fit(module)
    assert module.modes == {"sanity": ["deploy"], "fit": [mode] * BATCHES_PER_EPOCH, "validate": ["deploy"]}
    trainer.test(module)
    assert module.modes["test"] == ["deploy"]
    assert Snapshot.of(module) == before
    assert len(ours(trainer)) == 1


@pytest.mark.parametrize("value", [None, "off", " False"])
def test_without_a_mode_nothing_comes(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("LIGHTNING_CONVBN", raising=False)
    else:
        monkeypatch.setenv("LIGHTNING_CONVBN", value)
    assert ours(make_trainer()) == []


WRONG = {
    "Deploy": "there is no such mode; set the environment variable to one of 'tune', 'eval', 'train', or to 'off' to "
    "leave ConvBNModeCallback out",
    "train,target=backbone": "a mode may be followed by recompute=... or memory_budget=..., as "
    "'train,recompute=elementwise'",
    "tune, blocks": "a mode may be followed by recompute=... or memory_budget=..., as 'tune,recompute=elementwise'",
    "train,recompute=all": "recompute must be one of 'none', 'elementwise', 'blocks'; got 'all'.",
    "eval,memory_budget=much": "memory_budget='much' is no amount of memory, as 8GiB, 500MiB or 24GB, nor 'auto'",
}


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_value_is_an_error_that_says_what_to_set(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_CONVBN", value)
    with pytest.raises(ValueError, match=re.escape(f"LIGHTNING_CONVBN={value!r}: {WRONG[value]}")):
        make_trainer()


def test_recomputation_follows_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in {
        "train,recompute=elementwise": ("train", "elementwise", None),
        "Tune, Recompute = Blocks": ("tune", "blocks", None),
        "eval,memory_budget=8GiB": ("eval", "none", "8gib"),
    }.items():
        monkeypatch.setenv("LIGHTNING_CONVBN", value)
        (callback,) = ours(make_trainer())
        assert (callback.mode, callback.recompute, callback.memory_budget) == expected


def test_layers_built_in_configure_model_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not there yet when the callback is put in."""

    class Late(BoringModule):
        def __init__(self) -> None:
            super().__init__(nn.Identity)

        def configure_model(self) -> None:
            if isinstance(self.backbone, nn.Identity):
                self.build()

    monkeypatch.setenv("LIGHTNING_CONVBN", "tune")
    module = Late()
    make_trainer().fit(module)
    assert module.modes["fit"] == ["tune"] * BATCHES_PER_EPOCH


@pytest.mark.parametrize("method", ["fit", "predict"])
def test_list_of_callbacks_is_what_it_was(method: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After a run, and after a finder. A test of Lightning's own asks for it."""
    monkeypatch.setenv("LIGHTNING_CONVBN", "tune")
    module, trainer = BoringModule(), make_trainer(default_root_dir=tmp_path)
    module.batch_size = 2  # type: ignore[assignment]
    before = [*trainer.callbacks]
    Tuner(trainer).scale_batch_size(module, method=method, max_trials=1, steps_per_trial=1)
    assert trainer.callbacks == before
    getattr(trainer, method)(module)
    assert trainer.callbacks == before


def test_checkpoint_goes_with_a_callback_given_by_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the run decided, here that a BatchNorm stays in Train mode, holds when it is resumed the other way."""
    monkeypatch.setenv("LIGHTNING_CONVBN", "tune")
    trainer = make_trainer(default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"1 BatchNorm\(s\) of `backbone` stay in Train mode: `middle.1`"):
        trainer.fit(with_fresh_norm())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.delenv("LIGHTNING_CONVBN")
    callback = quick()
    resumed = with_fresh_norm()
    with pytest.warns(UserWarning, match=r"1 BatchNorm\(s\) of `backbone` stay in Train mode: `middle.1`"):
        make_trainer(callback, max_epochs=2).fit(resumed, ckpt_path=tmp_path / "run.ckpt")
    assert resumed.backbone.middle[1].num_batches_tracked == 2 * BATCHES_PER_EPOCH


# ------------------------------------------------------------------------------------------- when it stays away


@pytest.mark.parametrize("own", [quick("eval"), Subclass("eval", log_memory=False)], ids=["same class", "subclass"])
def test_never_beside_a_callback_given_by_code(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_CONVBN", "tune")
    module, trainer = BoringModule(), make_trainer(own)
    before = [*trainer.callbacks]
    trainer.fit(module)
    assert module.modes["fit"] == ["eval"] * BATCHES_PER_EPOCH
    assert trainer.callbacks == before


@pytest.mark.parametrize("first", [[], [BoringModule]], ids=["at once", "after it was used"])
def test_never_beside_a_callback_that_the_module_brings(first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_CONVBN", "tune")
    trainer = make_trainer()
    for make in first:
        trainer.validate(make())
    module = Given()
    trainer.fit(module)
    assert module.modes["fit"] == ["eval"] * BATCHES_PER_EPOCH
    assert [callback.mode for callback in ours(trainer)] == ["tune", "eval"]


@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_a_model_without_norm_runs_with_one_warning(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_CONVBN", "tune")
    module = BoringModule(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    trainer = make_trainer(num_sanity_val_steps=1)
    with pytest.warns(UserWarning, match="LIGHTNING_CONVBN=tune has no effect: .* has no BatchNorm") as warned:
        getattr(trainer, stage)(module)
    assert sum("LIGHTNING_CONVBN" in str(warning.message) for warning in warned) == 1
    assert set(module.modes) >= {stage}


# ------------------------------------------------------------------------------------------------ what it costs

TRAIN = """\
import sys
from importlib.metadata import entry_points

from lightning.pytorch import Trainer
from helpers.plain_module import Module

(entry_point,) = entry_points(group="lightning.pytorch.callbacks_factory", name="lightning_convbn")
entry_point.load()()
trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Module())
print("imported", sorted(name for name in sys.modules if "lightning_convbn" in name))
"""


def test_without_the_variable_nothing_of_the_package_is_imported(installed: Path) -> None:
    printed = type_in(installed, TRAIN)
    assert "imported ['lightning_convbn', 'lightning_convbn.entry_point']\n" in printed
    assert "ConvBN" not in printed


@pytest.mark.slow
def test_with_the_variable_a_script_fine_tunes_in_tune_mode(installed: Path) -> None:
    printed = type_in(installed, TRAIN, LIGHTNING_CONVBN="tune")
    assert "ConvBN: `backbone` trains in Tune mode and is evaluated in Deploy mode" in printed


DISTRIBUTED = """\
import sys

from lightning.pytorch import Trainer
from helpers.plain_module import Module

if __name__ == "__main__":
    module = Module()
    trainer = Trainer(
        strategy=sys.argv[1], devices=2, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(module)
    print("mean", module.backbone[1].running_mean.tolist(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "reports"), [("ddp", 2), ("ddp_spawn", 1)])
def test_processes_that_lightning_starts_inherit_the_variable(strategy: str, reports: int, installed: Path) -> None:
    """Every rank keeps the statistics: in Train mode they would move. Only `ddp` runs the whole script in each."""
    printed = type_in(installed, DISTRIBUTED, strategy, LIGHTNING_CONVBN="tune")
    assert printed.count("`backbone` trains in Tune mode") == 1
    assert printed.count("[1.0, 1.0, 1.0, 1.0]") == reports
