"""Where classified images come from: your own folders and lists, or data sets that need no network.

`SOURCES` is the table of names, and `read_source("imagefolder:PATH", seed)` looks a name up in it. To add a data set,
write a reader and put it into the table. A reader returns a `Source`, or raises a `DataError` that names the file.
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
    """Read every image file once, to find bad ones before training. A thousand photographs take a few seconds.

    Args:
        samples: The samples for training or testing.
        bad_images: What to do about a file that can't be read: `error` names it, `skip` leaves it out and prints its
            name, `unchecked` reads nothing.

    Returns:
        The samples without the skipped ones.

    Raises:
        DataError: If a file can't be read and `bad_images` is `error`.
    """
    if bad_images == "unchecked":
        return list(samples)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        reasons = list(threads.map(why_unreadable, (sample.image for sample in samples)))
    bad = [f"  {reason}" for reason in reasons if reason is not None]
    named = "\n".join(["", *bad[:NAMED_AT_MOST], *([f"... {len(bad)} in all"] if len(bad) > NAMED_AT_MOST else [])])
    if bad and bad_images == "error":
        raise DataError(
            f"{len(bad)} of {len(samples)} images can't be read; mend or remove them, or skip them by "
            f"bad_images=skip:{named}"
        )
    if bad:
        print(f"skipped {len(bad)} of {len(samples)} images, which can't be read:{named}", file=sys.stderr)
    return [sample for sample, reason in zip(samples, reasons, strict=True) if reason is None]


def why_unreadable(image: Path | NDArray[np.uint8], size: tuple[int, int] | None = None) -> str | None:
    """Read an image file to its end; return what is wrong with it, or None.

    Args:
        image: The file. Pixels are always good.
        size: Width and height that it must have.
    """
    if isinstance(image, Path):
        try:
            with Image.open(image) as opened:
                found = opened.size
                opened.draft("L", (1, 1))  # a JPEG is read to its end but decoded at an eighth of its size
                opened.load()
        except (OSError, SyntaxError, ValueError) as error:
            return f"{image}: {error}"
        if size not in (None, found):
            return f"{image}: {found[0]} x {found[1]} pixels, not {' x '.join(map(str, size or ()))} as stated"
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
    return Source(train.classes, [*stratified_split(sets[0], HELD_OUT, seed), sets[1]])


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
    "imagefolder": read_folder,
    "csv": read_csv,
}
WITHOUT_PATH = ("elpv", "fashion-mnist")
FORMS = [name if name in WITHOUT_PATH else f"{name}:PATH" for name in SOURCES]
