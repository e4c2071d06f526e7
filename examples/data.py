"""Images in batches for Lightning: a training, a validation and a test set with one way of reading and loading them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from datasets import SETS, BadImages, DataError, Sample, open_image, read_source, readable, stratified_split
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import MobileNet_V2_Weights
from torchvision.transforms import v2

Item = tuple[Tensor, int]
Set = TypeVar("Set", bound=Sized)
IMAGENET = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
"""Of all ImageNet weights here, torchvision's and most of timm's: mean and standard deviation per channel."""


class SplitData(LightningDataModule, ABC, Generic[Set]):
    """Three sets and their loaders; a subclass fills the sets and says what their items are.

    A subclass may set ``collate``, what makes a batch of items; None stacks them.

    Args:
        batch_size: Images per step.
        workers: Processes that read images.
        seed: Seed of the order and of random transforms, whatever the model does.

    Attributes:
        train: The training set.
        val: The validation set.
        test: The test set, which predict runs over, too.
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
        """Return what a loader batches, of one of the sets."""

    def check_batch(self) -> None:
        """Raise a DataError if there is not one whole training batch."""
        if len(self.train) < self.batch_size:
            raise DataError(
                f"batch size {self.batch_size}: there are only {len(self.train)} training images; "
                "give at most that many"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches: shuffled, augmented, all of one size if there is more than one."""
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


@dataclass
class Images(Dataset[Item]):
    """Images, read and transformed as they are asked for.

    Attributes:
        samples: The images and their classes.
        transform: From a PIL image in RGB to what the network takes.
    """

    samples: Sequence[Sample]
    transform: v2.Transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Return one image and its class."""
        image, label = self.samples[index]
        return self.transform(open_image(image)), label


class ImageData(SplitData[Sequence[Sample]]):
    """Classified images in a training, a validation and a test set.

    They are resized and normalised as the ImageNet weights expect; training images are flipped at random. The seed
    decides the sets, the batches and their order, whatever the model does.

    Args:
        source: `elpv`, `fashion-mnist`, `imagefolder:PATH`, `csv:PATH`, `cub:PATH` ...: see `datasets.SOURCES`.
        image_size: Edge of the square that the network sees, in pixels.
        batch_size: Images per step.
        limit: Train on at most so many images, the classes in their proportions; None for all.
        eval_limit: Validate, and test, on at most so many.
        workers: Processes that read images.
        seed: Seed of the split, the order and the flips.
        bad_images: What to do about files that can't be read: `error` names them before anything starts, `skip` leaves
            them out and prints which, `unchecked` reads none beforehand.

    Attributes:
        classes: The names of the classes.

    Raises:
        DataError: If the images can't be found or don't suffice.
    """

    def __init__(
        self,
        source: str,
        *,
        image_size: int = 128,
        batch_size: int = 32,
        limit: int | None = None,
        eval_limit: int | None = None,
        workers: int = 0,
        seed: int = 0,
        bad_images: BadImages = "error",
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.image_size = image_size
        self.classes, sets = read_source(source, seed)
        limits = {"limit": limit, "eval_limit": eval_limit}
        found = []
        for name, samples, option in zip(SETS, sets, ("limit", "eval_limit", "eval_limit"), strict=True):
            found.append(readable(_at_most(limits[option], samples, seed), bad_images))
            if missing := set(range(len(self.classes))) - {sample.label for sample in found[-1]}:
                few = limits[option] is not None and len(samples) > len(found[-1])
                fix = f"raise --{option} {limits[option]}" if few else "add some (6 to a class suffice for all sets)"
                raise DataError(
                    f"--data {source}: no image of class {self.classes[min(missing)]!r} is in the {name} set; {fix}"
                )
        self.train, self.val, self.test = found
        self.check_batch()

    @property
    def class_weights(self) -> list[float]:
        """Weight of each class in the loss, so that a rare class counts as much as a common one."""
        counts = Counter(sample.label for sample in self.train)
        return [len(self.train) / (len(counts) * counts[label]) for label in range(len(self.classes))]

    def items(self, samples: Sequence[Sample], *, training: bool) -> Images:
        """Return the images of a set; those to train on are flipped at random."""
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if training else []
        transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(self.image_size),
                v2.CenterCrop(self.image_size),
                *flips,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET.mean, IMAGENET.std),
            ]
        )
        return Images(samples, transform)


def _at_most(number: int | None, samples: list[Sample], seed: int) -> list[Sample]:
    """Draw so many samples, the classes in their proportions; None for all."""
    if number is None or number >= len(samples):
        return samples
    return stratified_split(samples, [number / len(samples)], seed)[0]
