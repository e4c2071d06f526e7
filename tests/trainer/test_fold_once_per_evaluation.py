"""Evaluation in Deploy mode folds once per run: not once per batch, nor once per dataloader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.counting_operations import NewTensors
from helpers.tiny_training import LIGHTNING_SAYS, BoringModule, images_and_targets, make_trainer, quick

pytestmark = LIGHTNING_SAYS


class CountsFolds(BoringModule):
    """Counts in each validation step the new tensors that have the shape of a convolution's weight.

    A fold makes such tensors. The activations have other shapes.
    """

    def __init__(self, dataloaders: int) -> None:
        super().__init__()
        self.per_batch: list[int] = []
        self.dataloaders = dataloaders

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        with NewTensors({weight.shape for weight in self.backbone.parameters() if weight.dim() == 4}) as new:
            self.step("validate", batch)
        self.per_batch.append(new.count)

    def val_dataloader(self) -> Any:
        return [images_and_targets(batches=4) for _ in range(self.dataloaders)]


@pytest.mark.parametrize("dataloaders", [1, 3])
def test_each_validation_run_of_a_fit_folds_at_its_first_batch_only(dataloaders: int) -> None:
    """The weights are new in each epoch."""
    module = CountsFolds(dataloaders)
    make_trainer(quick(), max_epochs=3).fit(module)
    batches = 4 * dataloaders
    assert len(module.per_batch) == 3 * batches
    for start in range(0, 3 * batches, batches):
        first, *others = module.per_batch[start : start + batches]
        assert first > 0
        assert others == [0] * (batches - 1)
    assert set(module.modes["validate"]) == {"deploy"}


def test_a_run_without_a_fit_folds_at_its_first_batch_only() -> None:
    module = CountsFolds(2)
    trainer = make_trainer(quick())
    for _ in range(2):
        module.per_batch.clear()
        trainer.validate(module, verbose=False)
        assert [count > 0 for count in module.per_batch] == [True, *[False] * 7]


def test_in_tune_mode_every_batch_folds() -> None:
    """So the count above sees folds where there are some."""
    module = CountsFolds(1)
    make_trainer(quick(eval_mode="tune")).validate(module, verbose=False)
    assert [count > 0 for count in module.per_batch] == [True] * 4
