"""Where classified images come from: data sets by name, read from their official layout on disk, or your own folders.

`SOURCES` is the table of names, and `read_source("cub:PATH", seed)` looks a name up in it. To add a data set, write a
reader and put it into the table. A reader returns a `Source`, or raises a `DataError` that names the file.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torchvision.datasets
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.utils import extract_archive

SETS = ("training", "validation", "test")
SPLIT = (0.70, 0.15, 0.15)
HELD_OUT = (0.90, 0.10)
"""Shares for training and for validation where a data set has no validation set of its own."""
DEFECTIVE_ABOVE = 0.5
"""Defect probability from which an ELPV cell counts as defective; experts gave 0, 1/3, 2/3 or 1."""
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
NAMED_AT_MOST = 10
"""A message names at most this many files, and counts all."""

BadImages = Literal["error", "skip", "unchecked"]


class DataError(ValueError):
    """The images can't be used. The message names the argument, its value and the fix."""


class Sample(NamedTuple):
    """An image, as a file or as pixels (height, width[, channels]), and the index of its class."""

    image: Path | NDArray[np.uint8]
    label: int


class Source(NamedTuple):
    """The names of the classes, and the samples of the training, validation and test set."""

    classes: Sequence[str]
    sets: Sequence[list[Sample]]


def read_source(source: str, seed: int) -> Source:
    """Find the images of `NAME` or `NAME:PATH`.

    Args:
        source: A key of `SOURCES`, followed by a colon and a path if the data set needs one.
        seed: Seed of the sets, if the data set does not define them.

    Raises:
        DataError: If they can't be found.
    """
    name, _, place = source.partition(":")
    if name not in SOURCES:
        raise DataError(f"--data {source}: unknown; give one of {', '.join(FORMS)}")
    path = Path(place).expanduser() if place else None
    if path is None and name not in WITHOUT_PATH:
        raise DataError(f"--data {source}: say where it lies, as --data {name}:PATH")
    if path is not None and not path.exists():
        raise DataError(f"--data {source}: there is no file or folder {path}")
    return SOURCES[name](path, seed)


def open_image(image: Path | NDArray[np.uint8]) -> Image.Image:
    """Return an image with three channels, even if it is grey.

    Raises:
        DataError: If its file can't be read.
    """
    if not isinstance(image, Path):
        return Image.fromarray(image).convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL's, by format
        raise DataError(f"{image} can't be read as an image: {error}") from error


def readable(samples: Sequence[Sample], bad_images: BadImages) -> list[Sample]:
    """Read every image file once, to find bad ones before training.

    Args:
        samples: The samples for training or testing.
        bad_images: What to do about a file that can't be read: `error` names it, `skip` leaves it out and prints its
            name, `unchecked` reads nothing. A thousand photographs take a few seconds.

    Returns:
        The samples without the skipped ones.

    Raises:
        DataError: If a file can't be read and `bad_images` is `error`.
    """
    if bad_images == "unchecked":
        return list(samples)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        reasons = list(threads.map(_why_unreadable, (sample.image for sample in samples)))
    bad = [reason for reason in reasons if reason is not None]
    named = "\n".join(["", *bad[:NAMED_AT_MOST], *([f"... {len(bad)} in all"] if len(bad) > NAMED_AT_MOST else [])])
    if bad and bad_images == "error":
        raise DataError(
            f"{len(bad)} of {len(samples)} images can't be read; mend or remove them, or skip them by "
            f"bad_images=skip:{named}"
        )
    if bad:
        print(f"skipped {len(bad)} of {len(samples)} images, which can't be read:{named}", file=sys.stderr)
    return [sample for sample, reason in zip(samples, reasons, strict=True) if reason is None]


def _why_unreadable(image: Path | NDArray[np.uint8]) -> str | None:
    if isinstance(image, Path):
        try:
            with Image.open(image) as opened:
                opened.draft("L", (1, 1))  # a JPEG is read to its end but decoded at an eighth of its size
                opened.load()
        except (OSError, SyntaxError, ValueError) as error:
            return f"  {image}: {error}"
    return None


def stratified_split(samples: Sequence[Sample], fractions: Sequence[float], seed: int) -> list[list[Sample]]:
    """Draw a set for each fraction at random. All sets have the classes in the same proportions."""
    random = Random(seed)
    sets: list[list[Sample]] = [[] for _ in fractions]
    for label in sorted({sample.label for sample in samples}):
        group = [sample for sample in samples if sample.label == label]
        random.shuffle(group)
        bounds = [round(fraction * len(group)) for fraction in accumulate(fractions, initial=0.0)]
        for drawn, (start, stop) in zip(sets, pairwise(bounds), strict=True):
            drawn += group[start:stop]
    return sets


# ------------------------------------------------------------------------------------------------ without a network


def read_solar_cells(path: Path | None, seed: int) -> Source:
    """Find ELPV: electroluminescence photographs of 2,624 solar cells, functional or defective.

    A cell counts as defective if its defect probability is above `DEFECTIVE_ABOVE`, that is 2/3 or 1: 821 cells of
    2,624. The data set does not say which cells come from one solar module. So cells of one module can be in the
    training and in the test set, and every score is a little too good.

    The images come in the PyPI package `elpv-dataset` under CC BY-NC-SA 4.0, which excludes commercial use; cite
    Buerhop-Lutz et al. 2018, https://doi.org/10.4229/35thEUPVSEC20182018-5CV.3.15.
    """
    package = find_spec("elpv_dataset")
    if package is None or package.origin is None:
        raise DataError(
            "--data elpv: the package that holds the photographs is not installed; "
            "run `pip install elpv-dataset` (90 MB), or use your own images with --data imagefolder:PATH"
        )
    folder = path or Path(package.origin).parent / "data"
    rows = (line.split() for line in (folder / "labels.csv").read_text().splitlines())
    samples = [Sample(folder / name, int(float(probability) > DEFECTIVE_ABOVE)) for name, probability, _ in rows]
    return Source(("functional", "defective"), stratified_split(samples, SPLIT, seed))


def read_photos(path: Path | None, seed: int) -> Source:
    """Cut two photographs that come with scikit-learn, of a temple and of a flower, into overlapping squares."""
    from sklearn.datasets import load_sample_images

    edge, step = 224, 40
    samples = [
        Sample(photo[top : top + edge, left : left + edge], label)
        for label, photo in enumerate(load_sample_images().images)
        for top in range(0, photo.shape[0] - edge + 1, step)
        for left in range(0, photo.shape[1] - edge + 1, step)
    ]
    return Source(("temple", "flower"), stratified_split(samples, SPLIT, seed))


def read_fashion_mnist(path: Path | None, seed: int) -> Source:
    """Find Fashion-MNIST: 70,000 grey images of clothes, 28 pixels wide, in 10 classes.

    Without a path they come from the Debian package `dataset-fashion-mnist`. A path is a folder with the four files,
    packed or not.
    """
    folder = path or DEBIAN_FASHION_MNIST
    if not folder.is_dir():
        raise DataError(
            f"--data fashion-mnist: there is no folder {folder}; run `apt-get install dataset-fashion-mnist`, or give "
            "the folder of the four files as --data fashion-mnist:PATH"
        )
    with TemporaryDirectory() as root:  # torchvision reads unpacked files only, and from a folder of this name
        raw = Path(root, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        for file in folder.glob("*-ubyte*"):
            if file.suffix == ".gz":
                with _explained(f"fashion-mnist:{folder}", f"{file} whole"):
                    extract_archive(str(file), str(raw))
            else:
                (raw / file.name).symlink_to(file.resolve())
        layout = "train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz] and the same of t10k"
        with _explained(f"fashion-mnist:{folder}", layout):
            train, test = (torchvision.datasets.FashionMNIST(root, train=train) for train in (True, False))
    sets = [list(map(Sample, part.data.numpy(), part.targets.tolist())) for part in (train, test)]
    return _with_validation(train.classes, sets, seed)


# ---------------------------------------------------------------------------------------------------- by their names


def read_cifar10(path: Path, seed: int) -> Source:
    """Find CIFAR-10 in `path/cifar-10-batches-py`."""
    with _explained(f"cifar10:{path}", "cifar-10-batches-py/ as in cifar-10-python.tar.gz"):
        train, test = (torchvision.datasets.CIFAR10(str(path), train=train) for train in (True, False))
    sets = [list(map(Sample, part.data, part.targets)) for part in (train, test)]
    return _with_validation(train.classes, sets, seed)


def read_aircraft(path: Path, seed: int) -> Source:
    """Find FGVC-Aircraft, 100 variants in 10,000 photographs, in `path/fgvc-aircraft-2013b`."""
    with _explained(f"aircraft:{path}", "fgvc-aircraft-2013b/data/ as in fgvc-aircraft-2013b.tar.gz"):
        parts = [torchvision.datasets.FGVCAircraft(str(path), split) for split in ("train", "val", "test")]
    # The private lists hold the file names; the items of the data set would be opened images.
    sets = [list(map(Sample, map(Path, part._image_files), part._labels)) for part in parts]
    return Source(parts[0].classes, sets)


def read_cars(path: Path, seed: int) -> Source:
    """Find Stanford Cars, 196 models in 16,185 photographs, in `path/stanford_cars`."""
    layout = "stanford_cars/ with devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat"
    with _explained(f"cars:{path}", layout):
        train, test = (torchvision.datasets.StanfordCars(str(path), split) for split in ("train", "test"))
    sets = [[Sample(Path(file), int(label)) for file, label in part._samples] for part in (train, test)]
    return _with_validation(train.classes, sets, seed)


def read_imagenet(path: Path, seed: int) -> Source:
    """Find ImageNet (ILSVRC 2012) in `path/train` and `path/val`; half of `val` is the test set.

    Beside them lies `meta.bin`, or the `ILSVRC2012_devkit_t12.tar.gz` that torchvision makes it from. Without either it
    is an `imagefolder`.
    """
    with _explained(f"imagenet:{path}", "train/, val/ and meta.bin or ILSVRC2012_devkit_t12.tar.gz"):
        train, val = (torchvision.datasets.ImageNet(str(path), split) for split in ("train", "val"))
    sets = [[Sample(Path(file), label) for file, label in part.samples] for part in (train, val)]
    return Source([names[0] for names in train.classes], [sets[0], *stratified_split(sets[1], (0.5, 0.5), seed)])


def read_cub(path: Path, seed: int) -> Source:
    """Find CUB-200-2011, 200 birds in 11,788 photographs, in `path` or `path/CUB_200_2011`.

    Four lists of numbered lines describe them: `classes.txt`, `images.txt`, `image_class_labels.txt` and
    `train_test_split.txt`, where 1 is for training.
    """
    folder = path / "CUB_200_2011" if (path / "CUB_200_2011").is_dir() else path
    names, files, labels, trains = (
        _numbered_lines(folder / f"{name}.txt")
        for name in ("classes", "images", "image_class_labels", "train_test_split")
    )
    for image in files:
        for name, of_images in (("image_class_labels", labels), ("train_test_split", trains)):
            if image not in of_images:
                raise DataError(f"--data cub:{path}: {folder / name}.txt has no line for image {image}, {files[image]}")
    classes = list(names)
    for image, label in labels.items():
        if label not in names:
            raise DataError(
                f"--data cub:{path}: {folder / 'image_class_labels.txt'} gives image {image} the class {label}, "
                f"but classes.txt has {len(names)} classes: {classes[0]} to {classes[-1]}"
            )
    samples = {image: Sample(folder / "images" / file, classes.index(labels[image])) for image, file in files.items()}
    sets = [[samples[image] for image in files if (trains[image] == "1") is wanted] for wanted in (True, False)]
    return _with_validation(list(names.values()), sets, seed)


def _numbered_lines(path: Path) -> dict[str, str]:
    """Read lines of a key and a value."""
    if not path.is_file():
        raise DataError(f"--data cub: there is no {path}; give the folder that CUB_200_2011.tgz unpacks to")
    lines = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        key, _, value = line.strip().partition(" ")
        if not value:
            raise DataError(f"--data cub: {path}, line {number}: {line!r} is not a number and a value")
        lines[key] = value
    return lines


# ------------------------------------------------------------------------------------------------------ of your own


def read_folder(path: Path, seed: int) -> Source:
    """Find images of your own: `path/CLASS/*.jpg`, or `path/{train,val,test}/CLASS/*.jpg`.

    Where `train` and `val` are there, they are the sets; `test` is the test set, or half of `val` if there is none. A
    folder without `train` is split by the seed.
    """
    if not (path / "train").is_dir():
        classes, samples = _read_classes(path)
        return Source(classes, stratified_split(samples, SPLIT, seed))
    classes, train = _read_classes(path, "train")
    others = []
    for part in ("val", "test") if (path / "test").is_dir() else ("val",):
        found, samples = _read_classes(path, part)
        if found != classes:
            raise DataError(
                f"--data imagefolder:{path}: train/ has the classes {', '.join(classes)}, but {part}/ has "
                f"{', '.join(found)}; give both the same sub-folders"
            )
        others.append(samples)
    return Source(classes, [train, *(others if len(others) == 2 else stratified_split(others[0], (0.5, 0.5), seed))])


def _read_classes(folder: Path, part: str = "") -> tuple[list[str], list[Sample]]:
    path = folder / part
    if not path.is_dir():
        raise DataError(f"--data imagefolder:{folder}: there is no folder {path}; it needs a sub-folder for each class")
    try:
        images = torchvision.datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise DataError(f"--data imagefolder:{folder}: {error} Give each class a sub-folder of images") from error
    if len(images.classes) == 1:
        raise DataError(
            f"--data imagefolder:{folder}: {path} has one class only, {images.classes[0]!r}; "
            "it needs a sub-folder for each class"
        )
    return images.classes, [Sample(Path(file), label) for file, label in images.samples]


def read_csv(path: Path, seed: int) -> Source:
    """Find images by a list: a CSV file with the columns `image`, `label` and, optionally, `set`.

    `image` is a path relative to the folder of the list, `label` the name of the class, `set` one of train, val and
    test. Without the column `set`, the sets are drawn by the seed.
    """
    with _explained(f"csv:{path}", "a line of column names and a line for each image"), path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    columns = list(reader.fieldnames or [])
    if missing := {"image", "label"} - set(columns):
        raise DataError(
            f"--data csv:{path}: no column {min(missing)!r}; the first line has {', '.join(columns) or '-'}"
        )
    if not rows:
        raise DataError(f"--data csv:{path}: no line but the first; give one for each image")
    for number, row in enumerate(rows, 2):
        if not row["image"] or not row["label"]:
            raise DataError(f"--data csv:{path}: line {number} has no {'image' if not row['image'] else 'label'}")
        if row.get("set", "train") not in ("train", "val", "test"):
            raise DataError(f"--data csv:{path}: line {number}: set is {row['set']!r}; give train, val or test")
    classes = sorted({row["label"] for row in rows})
    samples = [Sample(path.parent / row["image"], classes.index(row["label"])) for row in rows]
    if "set" not in columns:
        return Source(classes, stratified_split(samples, SPLIT, seed))
    sets = [
        [sample for sample, row in zip(samples, rows, strict=True) if row["set"] == part]
        for part in ("train", "val", "test")
    ]
    return Source(classes, sets)


# ---------------------------------------------------------------------------------------------------------- in common


def _with_validation(classes: Sequence[str], train_and_test: Sequence[list[Sample]], seed: int) -> Source:
    train, test = train_and_test
    return Source(classes, [*stratified_split(train, HELD_OUT, seed), test])


@contextmanager
def _explained(source: str, layout: str) -> Iterator[None]:
    """Turn an error of a reader into a DataError that names the source and the expected layout."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, csv.Error) as error:
        reason = str(error).partition(". You can use download")[0].rstrip(".")  # a hint that does not apply here
        raise DataError(f"--data {source}: {reason}; it must hold {layout}") from error


Reader = Callable[[Any, int], Source]
SOURCES: dict[str, Reader] = {
    "elpv": read_solar_cells,
    "fashion-mnist": read_fashion_mnist,
    "photos": read_photos,
    "imagefolder": read_folder,
    "csv": read_csv,
    "aircraft": read_aircraft,
    "cars": read_cars,
    "cub": read_cub,
    "cifar10": read_cifar10,
    "imagenet": read_imagenet,
}
WITHOUT_PATH = ("elpv", "fashion-mnist", "photos")
FORMS = [name if name in WITHOUT_PATH else f"{name}:PATH" for name in SOURCES]
