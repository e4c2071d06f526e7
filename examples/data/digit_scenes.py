"""Handwritten digits pasted on photographs, with exact masks and boxes, written in COCO's format or as masks.

Digits and photographs come with scikit-learn, so nothing is downloaded. Training, validation and test set share
neither a digit nor a part of a photograph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as rle
from sklearn.datasets import load_digits, load_sample_images

SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
"""Which part of the digits, and of the width of every photograph, belongs to a set."""
MOST_DIGITS = 5

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.bool_]


class Digit(NamedTuple):
    """A digit in a scene: what it is, and which pixels are its ink."""

    label: int
    mask: Bits

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the ink."""
        rows, columns = (np.flatnonzero(self.mask.any(axis)) for axis in (1, 0))
        left, top = int(columns[0]), int(rows[0])
        return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


class SceneMaker:
    """Draws scenes of one set.

    Args:
        split: The set, a key of `SHARES`.
        size: Edge of the square scenes in pixels.
        seed: Seed of everything that is drawn.
    """

    def __init__(self, split: str, size: int, seed: int) -> None:
        low, high = SHARES[split]
        digits = load_digits()
        share = slice(int(low * len(digits.images)), int(high * len(digits.images)))
        self._ink: Floats = digits.images[share].astype(np.float32) / 16
        self._labels = digits.target[share]
        self._photos = [
            Image.fromarray(photo[:, int(low * photo.shape[1]) : int(high * photo.shape[1])])
            for photo in load_sample_images().images
        ]
        self._size = size
        self._random = np.random.default_rng([seed, list(SHARES).index(split)])

    def draw(self) -> tuple[Image.Image, list[Digit]]:
        """Return a scene with one to `MOST_DIGITS` digits, none of which covers another."""
        scene = self._background()
        taken = np.zeros((self._size, self._size), bool)
        digits = []
        for _ in range(self._random.integers(1, MOST_DIGITS + 1)):
            index = self._random.integers(len(self._labels))
            edge = int(self._size * self._random.uniform(0.2, 0.4))
            top, left = self._random.integers(0, self._size - edge, 2)
            place = np.s_[top : top + edge, left : left + edge]
            if taken[place].any():
                continue
            taken[place] = True
            blurred = Image.fromarray(self._ink[index]).resize((edge, edge), Image.Resampling.BICUBIC)
            opacity = np.clip((np.asarray(blurred) - 0.3) / 0.2, 0, 1)[..., None]
            ground = scene[place]
            ink = self._random.uniform(0, 70, 3) if ground.mean() > 127 else self._random.uniform(185, 255, 3)
            scene[place] = opacity * ink + (1 - opacity) * ground
            mask = np.zeros_like(taken)
            mask[place] = opacity[..., 0] > 0.5
            digits.append(Digit(int(self._labels[index]), mask))
        return Image.fromarray(scene.astype(np.uint8)), digits

    def _background(self) -> Floats:
        photo = self._photos[self._random.integers(len(self._photos))]
        edge = int(min(photo.size) * self._random.uniform(0.5, 1.0))
        left, top = (int(self._random.integers(0, length - edge + 1)) for length in photo.size)
        crop = photo.resize((self._size, self._size), box=(left, top, left + edge, top + edge))
        return np.array(crop, np.float32)


def write_digit_scenes(folder: Path, scenes: Mapping[str, int], *, size: int, seed: int) -> None:
    """Write scenes in COCO's format: `images/*.jpg` and `annotations/instances_SET.json`.

    A folder that exists already is not changed.

    Args:
        folder: The folder to write.
        scenes: Set, a key of `SHARES` -> number of scenes.
        size: Edge of the square scenes in pixels.
        seed: Seed of everything that is drawn.
    """
    if folder.is_dir():
        return
    with folder_written_whole(folder) as whole:
        (whole / "images").mkdir()
        (whole / "annotations").mkdir()
        for split, number in scenes.items():
            maker = SceneMaker(split, size, seed)
            names = [f"{split}_{index:04}.jpg" for index in range(number)]
            drawn = [maker.draw() for _ in names]
            for name, (picture, _) in zip(names, drawn, strict=True):
                picture.save(whole / "images" / name, quality=95)
            content = as_coco(names, [digits for _, digits in drawn], size)
            (whole / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write_digit_masks(folder: Path, scenes: Mapping[str, int], *, size: int, seed: int) -> None:
    """Write scenes with a mask each, as `MaskData` reads them: `SET/images/*.png`, `SET/masks/*.png`, `classes.txt`.

    The arguments are those of `write_digit_scenes`.
    """
    if folder.is_dir():
        return
    with folder_written_whole(folder) as whole:
        for split, number in scenes.items():
            maker = SceneMaker(split, size, seed)
            images, masks = whole / split / "images", whole / split / "masks"
            images.mkdir(parents=True)
            masks.mkdir()
            for index in range(number):
                picture, digits = maker.draw()
                mask = np.zeros((size, size), np.uint8)
                for digit in digits:
                    mask[digit.mask] = digit.label + 1
                picture.save(images / f"{index:04}.png")
                Image.fromarray(mask).save(masks / f"{index:04}.png")
        (whole / "classes.txt").write_text("\n".join(["background", *map(str, range(10))]) + "\n")


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to ``folder`` if there was no error and no other process was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary, folder.name)
        whole.mkdir()
        yield whole
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def as_coco(names: Sequence[str], scenes: Sequence[Sequence[Digit]], size: int) -> dict[str, Any]:
    """Describe scenes in the format of COCO's annotation files, masks as run lengths."""
    numbers = count(1)
    annotations = []
    for image_id, digits in enumerate(scenes, start=1):
        for digit in digits:
            runs = rle.encode(np.asfortranarray(digit.mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": next(numbers),
                    "image_id": image_id,
                    "category_id": digit.label + 1,
                    "bbox": digit.box,
                    "area": int(digit.mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                }
            )
    images = [{"id": i, "file_name": name, "width": size, "height": size} for i, name in enumerate(names, start=1)]
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    return {"images": images, "annotations": annotations, "categories": categories}
