"""A checkpoint that a script saves when the fit is over knows what the run has decided."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_training import BATCHES_PER_EPOCH, LIGHTNING_SAYS, TRUSTED, make_trainer, quick, with_fresh_norm

pytestmark = LIGHTNING_SAYS


def test_an_untrained_batchnorm_stays_in_train_mode_in_the_resumed_run(tmp_path: Path) -> None:
    """By the checkpoint it has been trained, but the run that it comes from left it in Train mode."""
    trainer = make_trainer(quick())
    with pytest.warns(UserWarning, match="stay in Train mode"):
        trainer.fit(with_fresh_norm())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = with_fresh_norm()
    with pytest.warns(UserWarning, match="stay in Train mode: `middle.1`"):
        make_trainer(quick(), max_epochs=2).fit(resumed, ckpt_path=tmp_path / "last.ckpt", **TRUSTED)
    assert resumed.backbone.middle[1].num_batches_tracked == 2 * BATCHES_PER_EPOCH
