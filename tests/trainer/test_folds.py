"""Evaluation in Deploy mode folds once per run: not once per batch, nor per dataloader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.runs import LIGHTNING_SAYS, BoringModule, images_and_targets, make_trainer, quick

from lightning_convbn.layers import layers

pytestmark = LIGHTNING_SAYS

PAIRS = 3  # that a Backbone has


class CountsFolds(BoringModule):
    """Takes down how many pairs have been folded at the end of each run and of each batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dataloaders: int) -> None:
        super().__init__()
        self.folds = 0
        self.per_batch: list[int] = []
        self.per_run: list[int] = []
        self.dataloaders = dataloaders
        fold = layers.fold_conv_bn

        def counted(*args: Any, **options: Any) -> Any:
            self.folds += 1
            return fold(*args, **options)

        monkeypatch.setattr(layers, "fold_conv_bn", counted)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count."""
        before = self.folds
        self.step("validate", batch)
        self.per_batch.append(self.folds - before)

    def on_validation_start(self) -> None:
        """Start anew."""
        self.folds = 0

    def on_validation_end(self) -> None:
        """Take the sum."""
        self.per_run.append(self.folds)

    def val_dataloader(self) -> Any:
        """Give several batches, from one or more loaders."""
        return [images_and_targets(batches=4) for _ in range(self.dataloaders)]


@pytest.mark.parametrize("dataloaders", [1, 3])
def test_a_validation_run_folds_each_pair_once(dataloaders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CountsFolds(monkeypatch, dataloaders)
    make_trainer(quick(), max_epochs=3, num_sanity_val_steps=2).fit(module)
    assert module.per_run == [PAIRS] * 4  # the sanity check, and one run for each epoch, whose weights are new
    first, *others = module.per_batch[-4 * dataloaders :]
    assert first == PAIRS
    assert others == [0] * (4 * dataloaders - 1)
    assert set(module.modes["validate"]) == {"deploy"}


def test_a_run_without_a_fit_folds_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = CountsFolds(monkeypatch, 2)
    trainer = make_trainer(quick())
    for run in (1, 2):
        trainer.validate(module, verbose=False)
        assert module.per_run == [PAIRS] * run


def test_tune_mode_folds_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the count above would be without Deploy mode: the counter sees folds where there are some."""
    module = CountsFolds(monkeypatch, 1)
    original = layers.conv_bn

    def counted(*args: Any) -> torch.Tensor:
        module.folds += 1
        return original(*args)

    monkeypatch.setattr(layers, "conv_bn", counted)
    make_trainer(quick(eval_mode="tune")).validate(module, verbose=False)
    assert module.per_run == [4 * PAIRS]
