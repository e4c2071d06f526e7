"""Images in batches for Lightning: a training, a validation and a test set, each loaded in the same way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from torchvision.models import MobileNet_V2_Weights

from examples.data.sources import DataError

Set = TypeVar("Set", bound=Sized)
IMAGENET = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
"""Its `mean` and `std` normalise images for the ImageNet weights of torchvision and of most networks in timm."""


class SplitData(LightningDataModule, ABC, Generic[Set]):
    """Three sets and their loaders. A subclass fills the sets in its constructor, and defines `items`.

    A subclass may set ``collate``, the function that makes a batch from items; None stacks them.

    Args:
        batch_size: Images per step.
        workers: Processes that read images.
        seed: Seed of the order and of random transforms. The random numbers that the model draws don't change them.

    Attributes:
        train: The training set.
        val: The validation set.
        test: The test set; `Trainer.predict` uses it, too.
    """

    train: Set
    val: Set
    test: Set
    collate: Callable[[Sequence[Any]], Any] | None = None

    def __init__(self, batch_size: int, workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed

    @abstractmethod
    def items(self, samples: Set, *, training: bool) -> Dataset[Any]:
        """Return the dataset of items for one of the sets."""

    def check_batch(self) -> None:
        """Raise a DataError if the training images don't fill one batch."""
        if len(self.train) < self.batch_size:
            raise DataError(
                f"batch size {self.batch_size}: there are only {len(self.train)} training images; "
                "give at most that many"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, shuffled and augmented. The last one is dropped if it is not full."""
        return self._loader(self.train, training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches."""
        return self._loader(self.val, training=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches."""
        return self._loader(self.test, training=False)

    predict_dataloader = test_dataloader

    def _loader(self, samples: Set, *, training: bool) -> DataLoader[Any]:
        return DataLoader(
            self.items(samples, training=training),
            batch_size=self.batch_size,
            shuffle=training,
            drop_last=training and len(samples) > self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(self.seed),
        )
