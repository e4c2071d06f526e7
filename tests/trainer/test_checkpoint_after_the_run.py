"""Which BatchNorms stay in Train mode is known after the run, too: to a checkpoint, and to the next run."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    LIGHTNING_SAYS,
    BoringModule,
    make_trainer,
    quick,
    with_fresh_norm,
)

pytestmark = LIGHTNING_SAYS


STAYS = pytest.mark.filterwarnings("ignore:ConvBN. 1 BatchNorm.s. of `backbone` stay in Train mode")


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
