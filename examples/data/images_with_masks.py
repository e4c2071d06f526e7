"""Images with a mask each, which gives every pixel a class: a folder of your own, or digits pasted on photographs.

The folder holds `classes.txt` with a name in each line, and for each of the sets `train`, `val` and `test` two folders:
`SET/images/NAME.jpg` (or `.png`) and `SET/masks/NAME.png`. A pixel of a mask is a line number of `classes.txt`, from 0,
or 255 where nothing counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from examples.data.data_module import IMAGENET, SplitData
from examples.data.sources import BadImages, DataError, Sample, open_image, readable

IGNORED = 255
SETS = ("train", "val", "test")
IMAGES = {".jpg", ".jpeg", ".png"}
SCENES = {"train": 320, "val": 48, "test": 80}

Masked = tuple[Tensor, Tensor]


class MaskedSample(NamedTuple):
    """An image file and its mask."""

    image: Path
    mask: Path


@dataclass
class MaskedImages(Dataset[Masked]):
    """Image files and masks that are read and transformed together when they are needed.

    Attributes:
        samples: The files.
        transform: Transforms an image and a mask, given as TVTensors.
    """

    samples: Sequence[MaskedSample]
    transform: v2.Transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Masked:
        """Return one image and the class of each of its pixels."""
        sample = self.samples[index]
        mask = tv_tensors.Mask(torch.from_numpy(_read_mask(sample.mask)))
        image, mask = self.transform(tv_tensors.Image(open_image(sample.image)), mask)
        return image, mask.long()


class MaskData(SplitData[Sequence[MaskedSample]]):
    """Images with masks in a training, a validation and a test set, normalised as the ImageNet weights expect.

    Args:
        folder: The folder; None draws digits on photographs into `cache`, once, and uses those.
        image_size: Edge of the square that the network sees, in pixels.
        batch_size: Images per step.
        flip: Flip training images at random, left to right; not for digits.
        workers: Processes that read images.
        seed: Seed of the order, the flips and the drawn digits.
        bad_images: What to do about images that can't be read, as for `ImageData`. A bad mask is always an error.
        cache: Folder for the digits on photographs.

    Attributes:
        classes: The names of the classes.

    Raises:
        DataError: If the images or the masks can't be used.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        image_size: int = 128,
        batch_size: int = 8,
        flip: bool = False,
        workers: int = 0,
        seed: int = 0,
        bad_images: BadImages = "error",
        cache: Path = Path("runs/data"),
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.image_size = image_size
        self.flip = flip
        if folder is None:
            from examples.data.digit_scenes import write_digit_masks  # it needs more packages than masks do

            folder = cache / f"digit-masks-{image_size}-{seed}"
            write_digit_masks(folder, SCENES, size=image_size, seed=seed)
        self.classes = _read_classes(folder)
        self.train, self.val, self.test = (_find_samples(folder / part, len(self.classes), bad_images) for part in SETS)
        self.check_batch()

    @property
    def class_weights(self) -> list[float]:
        """Weight of each class in the loss: the inverse square root of its share of the pixels."""
        counts = np.zeros(IGNORED + 1, np.int64)
        for sample in self.train:
            counts += np.bincount(_read_mask(sample.mask).ravel(), minlength=IGNORED + 1)
        found = counts[: len(self.classes)]
        weights = np.sqrt(found.sum() / np.maximum(found, 1)) * (found > 0)  # 0 for a class without pixels
        scaled: list[float] = (weights * found.sum() / max(1.0, float((weights * found).sum()))).tolist()
        return scaled

    def items(self, samples: Sequence[MaskedSample], *, training: bool) -> MaskedImages:
        """Return the images of a set with their masks."""
        size = (self.image_size, self.image_size)
        transform = v2.Compose(
            [
                v2.Resize(size),
                *([v2.RandomHorizontalFlip()] if training and self.flip else []),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(IMAGENET.mean, IMAGENET.std),
            ]
        )
        return MaskedImages(samples, transform)


def _read_classes(folder: Path) -> list[str]:
    path = folder / "classes.txt"
    if not path.is_file():
        raise DataError(f"--data.folder {folder}: there is no {path}; write the name of a class to each line")
    classes = path.read_text().split("\n")
    while classes and not classes[-1].strip():
        classes.pop()
    if not 2 <= len(classes) <= IGNORED:
        raise DataError(f"--data.folder {folder}: {path} has {len(classes)} classes; give 2 to {IGNORED}, a line each")
    return classes


def _find_samples(folder: Path, num_classes: int, bad_images: BadImages) -> list[MaskedSample]:
    images = sorted(path for path in (folder / "images").glob("*") if path.suffix.lower() in IMAGES)
    if not images:
        raise DataError(f"{folder / 'images'} holds no image; put .jpg or .png files there")
    samples = [MaskedSample(image, folder / "masks" / f"{image.stem}.png") for image in images]
    for sample in samples:
        if not sample.mask.is_file():
            raise DataError(f"{sample.image} has no mask; there must be {sample.mask}")
    kept = {sample.image for sample in readable([Sample(sample.image, 0) for sample in samples], bad_images)}
    samples = [sample for sample in samples if sample.image in kept]
    if bad_images != "unchecked":
        with ThreadPoolExecutor() as threads:
            for wrong in threads.map(lambda sample: _why_wrong(sample, num_classes), samples):
                if wrong is not None:
                    raise DataError(wrong)
    return samples


def _why_wrong(sample: MaskedSample, num_classes: int) -> str | None:
    """Return what is wrong with a mask, or None."""
    mask = _read_mask(sample.mask)
    with Image.open(sample.image) as image:
        if mask.shape != (image.height, image.width):
            return (
                f"{sample.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, its image {image.width} x {image.height}"
            )
    values = np.unique(mask)
    if (wrong := values[(values >= num_classes) & (values != IGNORED)]).size:
        return (
            f"{sample.mask} has pixels of class {wrong[0]}, but classes.txt has {num_classes} classes, "
            f"0 to {num_classes - 1}; add the missing ones, or write {IGNORED} where nothing counts"
        )
    return None


def _read_mask(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as mask:
            if mask.mode not in ("L", "P"):
                raise DataError(f"{path} has pixels of mode {mask.mode}; a mask has one channel of 8 bits, L or P")
            return np.array(mask, np.uint8)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} can't be read as a mask: {error}") from error
