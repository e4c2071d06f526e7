"""Checkpoints are those of the plain model. A resumed run ends where an uninterrupted one does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    RESUMING_SAYS,
    TRUSTED,
    BoringModule,
    ResumableLoader,
    Snapshot,
    differing,
    images_and_targets,
    make_trainer,
    quick,
    state_of,
    with_fresh_norm,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

pytestmark = [*RESUMING_SAYS, pytest.mark.filterwarnings("ignore:ConvBN. start_epoch=. is not reached")]
STAYS = pytest.mark.filterwarnings("ignore:ConvBN. 1 BatchNorm.s. of `backbone` stay in Train mode")


def train(module: BoringModule, folder: Path, epochs: int, *callbacks: Any, resume: Path | None = None) -> None:
    """Train, with a checkpoint after every epoch: ``epoch=0.ckpt``, ``epoch=1.ckpt`` and so on."""
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(*callbacks, saving, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, ckpt_path=resume, **TRUSTED)


def checkpoint_of(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("mode", ["train", "eval", "tune"])
def test_a_checkpoint_is_that_of_the_plain_model(tmp_path: Path, mode: Any) -> None:
    """The same keys, and exactly the tensors that the module had when it was saved."""
    module = BoringModule()
    train(module, tmp_path, 2, quick(mode))
    state = checkpoint_of(tmp_path / "epoch=1.ckpt")["state_dict"]
    plain = BoringModule()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state, strict=True)
    assert differing(state_of(plain), state_of(module)) == []
    read = BoringModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt", **TRUSTED)
    assert differing(state_of(read), state_of(module)) == []


def test_a_checkpoint_that_is_saved_while_folded_is_plain_too(tmp_path: Path) -> None:
    """In validation the module is in Deploy mode."""

    class SavesInValidation(BoringModule):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.trainer.save_checkpoint(tmp_path / "folded.ckpt")

    module = SavesInValidation()
    make_trainer(quick()).fit(module)
    assert module.modes["validate"] == ["deploy"]
    plain = BoringModule()
    plain.load_state_dict(checkpoint_of(tmp_path / "folded.ckpt")["state_dict"], strict=True)
    assert differing(state_of(plain), state_of(module)) == []


def test_a_run_without_the_callback_is_resumed_with_it_and_the_other_way_round(tmp_path: Path) -> None:
    modes = []
    for epoch, callbacks in enumerate(([], [quick()], [])):
        module = BoringModule()
        before = Snapshot.of(module)
        train(module, tmp_path, epoch + 1, *callbacks, resume=tmp_path / f"epoch={epoch - 1}.ckpt" if epoch else None)
        modes.append(set(module.modes["fit"]))
        assert Snapshot.of(module) == before
        assert len(module.modes["fit"]) == BATCHES_PER_EPOCH
    assert modes == [{"train"}, {"tune"}, {"train"}]


@pytest.mark.parametrize(("start_epoch", "interrupted_at"), [(0, 1), (1, 1), (2, 1)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, start_epoch: int, interrupted_at: int
) -> None:
    """Bit for bit, before, at and after the epoch that switches to Tune mode."""
    straight = BoringModule()
    train(straight, tmp_path / "straight", 3, quick(start_epoch=start_epoch))

    train(BoringModule(), tmp_path, interrupted_at, quick(start_epoch=start_epoch))
    resumed = BoringModule()
    checkpoint = tmp_path / f"epoch={interrupted_at - 1}.ckpt"
    train(resumed, tmp_path, 3, quick(start_epoch=start_epoch), resume=checkpoint)
    assert resumed.modes["fit"] == straight.modes["fit"][interrupted_at * BATCHES_PER_EPOCH :]
    assert resumed.losses["fit"] == straight.losses["fit"][interrupted_at * BATCHES_PER_EPOCH :]
    assert resumed.losses["validate"] == straight.losses["validate"][interrupted_at:]
    assert differing(state_of(resumed), state_of(straight)) == []


@STAYS
def test_an_untrained_batchnorm_is_still_known_when_the_run_is_resumed(tmp_path: Path) -> None:
    """By then its statistics have moved, and it must go on as it began."""
    straight = with_fresh_norm()
    train(straight, tmp_path / "straight", 2, quick())

    train(with_fresh_norm(), tmp_path, 1, quick())
    resumed = with_fresh_norm()
    train(resumed, tmp_path, 2, quick(), resume=tmp_path / "epoch=0.ckpt")
    assert resumed.losses["fit"] == straight.losses["fit"][BATCHES_PER_EPOCH:]
    assert differing(state_of(resumed), state_of(straight)) == []


@STAYS
def test_later_stages_keep_the_note(tmp_path: Path) -> None:
    """So the checkpoints before and after a test are the same."""
    module, trainer, notes = with_fresh_norm(), make_trainer(quick()), []
    trainer.fit(module)
    for stage in (trainer.validate, trainer.test, trainer.predict):
        stage(module)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        notes.append(torch.load(tmp_path / "saved.ckpt", weights_only=False)["lightning_convbn"])
    assert notes == [{"backbone": ["middle.1"]}] * 3


def test_a_second_fit_leaves_it_in_train_mode_and_says_so_again() -> None:
    """By its statistics it has been trained by then."""
    module, callback = with_fresh_norm(), quick()
    for fits in (1, 2):
        with pytest.warns(UserWarning, match="1 BatchNorm.s. of `backbone` stay in Train mode: `middle.1`"):
            make_trainer(callback).fit(module)
        assert module.backbone.middle[1].num_batches_tracked == fits * BATCHES_PER_EPOCH


@STAYS
def test_another_module_has_no_part_in_the_note() -> None:
    """Its BatchNorm of that name has been trained."""
    callback, other = quick(), BoringModule()
    make_trainer(callback).fit(with_fresh_norm())
    make_trainer(callback).fit(other)
    assert other.backbone.middle[1].num_batches_tracked == 0


@STAYS
def test_a_callback_that_was_used_can_be_copied_and_pickled() -> None:
    """The copy is of the arguments, and of no run."""
    callback = quick("eval")
    make_trainer(callback).fit(with_fresh_norm())
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        module = BoringModule()
        make_trainer(copied).fit(module)
        assert module.modes["fit"] == ["eval"] * BATCHES_PER_EPOCH


class ResumableModule(BoringModule):
    """The tiny module, on a data loader that can be resumed."""

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(images_and_targets().dataset, batch_size=2)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_is_resumed_in_the_middle_of_an_epoch(tmp_path: Path, steps: int) -> None:
    """In the second case in the second epoch."""
    straight = ResumableModule()
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    make_trainer(quick(), saving, max_epochs=3, enable_checkpointing=True).fit(straight)

    resumed = ResumableModule()
    trainer = make_trainer(quick(), max_epochs=3)
    trainer.fit(resumed, ckpt_path=tmp_path / f"step={steps}.ckpt", **TRUSTED)
    assert trainer.global_step == 3 * BATCHES_PER_EPOCH
    assert resumed.losses["fit"] == straight.losses["fit"][steps:]
    assert resumed.modes["fit"] == straight.modes["fit"][steps:]
    assert differing(state_of(resumed), state_of(straight)) == []
