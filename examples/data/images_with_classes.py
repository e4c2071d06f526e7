"""Images with a class each, from any source of `sources.py`: the data of the classification templates."""

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
    """Images that are read and transformed when they are needed.

    Attributes:
        samples: The images and their classes.
        transform: From a PIL image in RGB to the input of the network.
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

    They are resized and normalised as the ImageNet weights expect. Training images are flipped at random. The seed
    alone decides the sets, the batches and their order.

    Args:
        source: `elpv`, `fashion-mnist`, `imagefolder:PATH` or `csv:PATH`: see `sources.SOURCES`.
        image_size: Edge of the square that the network sees, in pixels.
        batch_size: Images per step.
        limit: Most training images, drawn with the classes in their proportions; None for all.
        eval_limit: Most validation images, and most test images.
        workers: Processes that read images.
        seed: Seed of the split, the order and the flips.
        bad_images: What to do about files that can't be read: `error` names them before training, `skip` leaves them
            out and prints their names, `unchecked` checks nothing beforehand.

    Attributes:
        classes: The names of the classes.

    Raises:
        DataError: If the images can't be found or are too few.
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
        """Return the images of a set. Training images are flipped at random."""
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
    """Draw this many samples, with the classes in their proportions; None for all."""
    if number is None or number >= len(samples):
        return samples
    return stratified_split(samples, [number / len(samples)], seed)[0]
