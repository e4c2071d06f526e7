"""Images in batches for Lightning: a training, a validation and a test set with one way of reading and loading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from examples.data.data_module import IMAGENET, SplitData
from examples.data.sources import (
    SETS,
    BadImages,
    DataError,
    Sample,
    open_image,
    read_source,
    readable,
    stratified_split,
)

Item = tuple[Tensor, int]


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
