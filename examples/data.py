"""Images to fine-tune on: photographs of solar cells from PyPI, or a folder of your own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.models import MobileNet_V2_Weights
from torchvision.transforms import v2

Item = tuple[Tensor, int]
SETS = ("training", "validation", "test")
SPLIT = (0.70, 0.15, 0.15)
DEFECTIVE_ABOVE = 0.5
"""Defect probability from which an ELPV cell counts as defective; experts gave 0, 1/3, 2/3 or 1."""


class DataError(ValueError):
    """The images can't be used; the message names the argument, its value and the fix."""


class Sample(NamedTuple):
    """An image file and the index of its class."""

    path: Path
    label: int


class Source(NamedTuple):
    """The names of the classes, and the samples of the training, validation and test set."""

    classes: Sequence[str]
    sets: Sequence[list[Sample]]


@dataclass
class Images(Dataset[Item]):
    """Image files, read and transformed as they are asked for.

    Attributes:
        samples: The files and their classes.
        transform: From a PIL image in RGB to what the network takes.
    """

    samples: Sequence[Sample]
    transform: v2.Transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Return one image, with three channels even where the file is grey, and its class."""
        path, label = self.samples[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


class ImageData(LightningDataModule):
    """Images on disk in a training, a validation and a test set.

    They are resized and normalised as the ImageNet weights expect; training images are flipped at random. The seed
    decides the sets, the batches and their order, whatever the model does.

    Args:
        source: `elpv` for the solar cells (`read_solar_cells`), `imagefolder:PATH` for your own (`read_folder`).
        image_size: Edge of the square that the network sees, in pixels.
        batch_size: Images per step.
        limit: Train on at most so many images, the classes in their proportions; None for all.
        workers: Processes that read images.
        seed: Seed of the split, the order and the flips.

    Attributes:
        classes: The names of the classes.
        train: The training set.
        val: The validation set.
        test: The test set.

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
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        kind, _, folder = source.partition(":")
        if source == "elpv":
            self.classes, (self.train, self.val, self.test) = read_solar_cells(seed)
        elif kind == "imagefolder" and folder:
            self.classes, (self.train, self.val, self.test) = read_folder(Path(folder).expanduser(), seed)
        else:
            raise DataError(f"--data {source}: unknown; give elpv or imagefolder:PATH")
        if limit is not None and limit < len(self.train):
            (self.train,) = stratified_split(self.train, [limit / len(self.train)], seed)
        for name, samples in zip(SETS, (self.train, self.val, self.test), strict=True):
            if missing := set(range(len(self.classes))) - {sample.label for sample in samples}:
                few = limit is not None and name == "training"
                fix = f"raise --limit {limit}" if few else "add some (6 to a class suffice for all sets)"
                raise DataError(
                    f"--data {source}: no image of class {self.classes[min(missing)]!r} is in the {name} set; {fix}"
                )
        if len(self.train) < batch_size:
            raise DataError(
                f"--batch-size {batch_size}: there are only {len(self.train)} training images; give at most that many"
            )

    @property
    def class_weights(self) -> list[float]:
        """Weight of each class in the loss, so that a rare class counts as much as a common one."""
        counts = Counter(sample.label for sample in self.train)
        return [len(self.train) / (len(counts) * counts[label]) for label in range(len(self.classes))]

    def train_dataloader(self) -> DataLoader[Item]:
        """Return the training batches: shuffled, flipped, all of one size."""
        return self._loader(self.train, training=True)

    def val_dataloader(self) -> DataLoader[Item]:
        """Return the validation batches."""
        return self._loader(self.val, training=False)

    def test_dataloader(self) -> DataLoader[Item]:
        """Return the test batches."""
        return self._loader(self.test, training=False)

    def _loader(self, samples: Sequence[Sample], *, training: bool) -> DataLoader[Item]:
        imagenet = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if training else []
        transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(self.image_size),
                v2.CenterCrop(self.image_size),
                *flips,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(imagenet.mean, imagenet.std),
            ]
        )
        return DataLoader(
            Images(samples, transform),
            batch_size=self.batch_size,
            shuffle=training,
            drop_last=training,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )


def read_solar_cells(seed: int) -> Source:
    """Find ELPV: electroluminescence photographs of 2,624 solar cells, functional or defective.

    Above a defect probability of `DEFECTIVE_ABOVE`, that is at 2/3 and 1, a cell counts as defective: 821 cells against
    1,803. The data set does not tell which cells come from one solar module, so that siblings of training cells are
    in the test set, which flatters every score a little.

    The images come in the PyPI package `elpv-dataset` under CC BY-NC-SA 4.0, which excludes commercial use; cite
    Buerhop-Lutz et al. 2018, https://doi.org/10.4229/35thEUPVSEC20182018-5CV.3.15.
    """
    package = find_spec("elpv_dataset")
    if package is None or package.origin is None:
        raise DataError(
            "--data elpv: the package that holds the photographs is not installed; "
            "run `pip install elpv-dataset` (90 MB), or use your own images with --data imagefolder:PATH"
        )
    folder = Path(package.origin).parent / "data"
    rows = (line.split() for line in (folder / "labels.csv").read_text().splitlines())
    samples = [Sample(folder / name, int(float(probability) > DEFECTIVE_ABOVE)) for name, probability, _ in rows]
    return Source(("functional", "defective"), stratified_split(samples, SPLIT, seed))


def read_folder(folder: Path, seed: int) -> Source:
    """Find images of your own: `folder/CLASS/*.jpg`, or `folder/{train,val,test}/CLASS/*.jpg`.

    Where `train` and `val` are there, they are the sets; `test` is the test set, or half of `val` if there is none. A
    folder without `train` is split by the seed.
    """
    if not (folder / "train").is_dir():
        classes, samples = _read_classes(folder)
        return Source(classes, stratified_split(samples, SPLIT, seed))
    classes, train = _read_classes(folder, "train")
    others = []
    for part in ("val", "test") if (folder / "test").is_dir() else ("val",):
        found, samples = _read_classes(folder, part)
        if found != classes:
            raise DataError(
                f"--data imagefolder:{folder}: train/ has the classes {', '.join(classes)}, but {part}/ has "
                f"{', '.join(found)}; give both the same sub-folders"
            )
        others.append(samples)
    return Source(classes, [train, *(others if len(others) == 2 else stratified_split(others[0], (0.5, 0.5), seed))])


def stratified_split(samples: Sequence[Sample], fractions: Sequence[float], seed: int) -> list[list[Sample]]:
    """Draw a set for each fraction, at random, with the classes in the same proportions in all of them."""
    random = Random(seed)
    sets: list[list[Sample]] = [[] for _ in fractions]
    for label in sorted({sample.label for sample in samples}):
        group = [sample for sample in samples if sample.label == label]
        random.shuffle(group)
        bounds = [round(fraction * len(group)) for fraction in accumulate(fractions, initial=0.0)]
        for drawn, (start, stop) in zip(sets, pairwise(bounds), strict=True):
            drawn += group[start:stop]
    return sets


def _read_classes(folder: Path, part: str = "") -> tuple[list[str], list[Sample]]:
    path = folder / part
    if not path.is_dir():
        raise DataError(f"--data imagefolder:{folder}: there is no folder {path}; it needs a sub-folder for each class")
    try:
        images = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise DataError(f"--data imagefolder:{folder}: {error} Give each class a sub-folder of images") from error
    if len(images.classes) == 1:
        raise DataError(
            f"--data imagefolder:{folder}: {path} has one class only, {images.classes[0]!r}; "
            "it needs a sub-folder for each class"
        )
    return images.classes, [Sample(Path(file), label) for file, label in images.samples]
