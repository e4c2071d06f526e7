"""Images with boxes in COCO's format: a folder of your own, or digits on photographs that need no download."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2

from examples.data.data_module import SplitData
from examples.data.digit_scenes import write_digit_scenes
from examples.data.sources import DataError, why_unreadable

Target = dict[str, Tensor]
Item = tuple[Tensor, Target]
Batch = tuple[tuple[Tensor, ...], tuple[Target, ...]]

LAYOUTS = (
    ("annotations/instances_{}.json", "{}"),  # COCO's own: a folder of images to a set
    ("annotations/instances_{}.json", "images/{}"),
    ("annotations/instances_{}.json", "images"),
    ("{}/_annotations.coco.json", "{}"),  # what Roboflow exports
)
"""Where the annotation file and the images of a set may lie in a folder."""
DIGIT_SCENES = {"train": 480, "val": 80, "test": 80}
DIGIT_SCENE_SIZE = 192
NAMED = 3
"""A message names this many of the annotations that are left out or changed, and counts all."""


class CocoImages(CocoDetection):
    """Images with boxes as the detectors of torchvision expect them.

    Label 0 is the background; the categories follow in the order of their ids. The constructor checks everything,
    images included, so that a bad file does not stop a training halfway.

    Args:
        annotations: The annotation file.
        images: The folder of the images.
        transforms: Transforms an image and its target.
        masks: Read masks, too.
        training: Leave out crowds.
        keep_empty: Keep images without a box.

    Attributes:
        classes: The names of the categories.
        notes: What is left out or changed -> the places.

    Raises:
        DataError: If something can't be used; the message names the file and the fix.
    """

    ids: list[int]  # torchvision leaves it untyped

    def __init__(
        self,
        annotations: Path,
        images: Path,
        transforms: v2.Transform,
        *,
        masks: bool = False,
        training: bool = False,
        keep_empty: bool = True,
    ) -> None:
        try:
            with redirect_stdout(io.StringIO()):  # pycocotools talks
                super().__init__(images, str(annotations), transforms=transforms)
            entries: list[dict[str, Any]] = self.coco.dataset["annotations"]
            categories = sorted(self.coco.dataset["categories"], key=lambda category: category["id"])
            self.classes = [str(category["name"]) for category in categories]
            sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in self.coco.dataset["images"]}
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise DataError(f"{annotations}: not an annotation file in COCO's format ({reason})") from error
        self.annotations = annotations
        self.masks = masks
        self.notes: dict[str, list[str]] = defaultdict(list)
        self._labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        self._sizes = sizes
        self.coco.dataset["annotations"] = [entry for entry in entries if self._is_usable(entry, training)]
        with redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        if not keep_empty:
            empty = [image for image in self.ids if not self.coco.imgToAnns[image]]
            self.notes["images without a box are left out"] += map(self._file_name, empty)
            self.ids = [image for image in self.ids if self.coco.imgToAnns[image]]
        if not self.coco.dataset["annotations"]:
            raise DataError("\n  ".join([f"{annotations}: not one box that can be used", *self.describe_notes()]))
        self._check_images()

    def __getitem__(self, index: int) -> Item:
        """Return an image and its target: boxes (left, top, right, bottom), labels, crowds and, if asked for, masks."""
        image = self._load_image(self.ids[index])
        entries = self._load_target(self.ids[index])
        corners = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(image.height, image.width)),
            "labels": torch.tensor([self._labels[entry["category_id"]] for entry in entries], dtype=torch.int64),
            "iscrowd": torch.tensor([entry.get("iscrowd", 0) for entry in entries], dtype=torch.int64),
        }
        if self.masks:
            masks = torch.zeros(len(entries), image.height, image.width, dtype=torch.uint8)
            for mask, entry in zip(masks, entries, strict=True):
                mask.copy_(torch.from_numpy(self.coco.annToMask(entry)))
            target["masks"] = tv_tensors.Mask(masks)
        transformed: Item = self.transforms(image, target)
        return transformed

    def describe_notes(self) -> list[str]:
        """Return a line for each kind of change: what, how often, and the first places."""
        lines = []
        for what, places in self.notes.items():
            if places:
                more = ", ..." if len(places) > NAMED else ""
                lines.append(f"{self.annotations}: {len(places)} {what}: {', '.join(places[:NAMED])}{more}")
        return lines

    def _file_name(self, image: int) -> str:
        return str(self.coco.imgs[image]["file_name"])

    def _is_usable(self, entry: dict[str, Any], training: bool) -> bool:
        """Check an annotation; clip its box to the image."""
        where = f"{self.annotations}: annotation {entry.get('id')}"
        if entry["image_id"] not in self._sizes:
            raise DataError(
                f"{where} belongs to image_id {entry['image_id']}, which `images` does not list; add it there"
            )
        if entry.get("category_id") not in self._labels:
            known = ", ".join(map(str, self._labels))
            raise DataError(
                f"{where} has category_id {entry.get('category_id')}, but `categories` lists {known}; add it there"
            )
        box = entry.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
            raise DataError(f"{where} has bbox {box}; give [left, top, width, height] in pixels")
        if self.masks and not entry.get("segmentation"):
            raise DataError(f"{where} has no segmentation, which Mask R-CNN learns from; use another architecture")
        place = f"annotation {entry.get('id')} in {self._file_name(entry['image_id'])}"
        if training and entry.get("iscrowd"):
            self.notes["crowds are left out"].append(place)
            return False
        width, height = self._sizes[entry["image_id"]]
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        clipped = [max(left, 0), max(top, 0), min(right, width), min(bottom, height)]
        entry["bbox"] = [*clipped[:2], clipped[2] - clipped[0], clipped[3] - clipped[1]]
        if min(entry["bbox"][2:]) < 1:
            self.notes["boxes with less than a pixel inside their image are left out"].append(place)
            return False
        if max(abs(before - after) for before, after in zip((left, top, right, bottom), clipped, strict=True)) >= 1:
            self.notes["boxes are clipped to their image"].append(place)
        return True

    def _check_images(self) -> None:
        files = [(Path(self.root, self._file_name(image)), self._sizes[image]) for image in self.ids]
        with ThreadPoolExecutor() as pool:
            problems = [problem for problem in pool.map(lambda file: why_unreadable(*file), files) if problem]
        if problems:
            raise DataError(
                f"{self.annotations}: {len(problems)} of its {len(self.ids)} images can't be used: "
                f"{'; '.join(problems[:NAMED])}. Mend them, or take them out of the file"
            )


def as_batch(items: Sequence[Item]) -> Batch:
    """Make a batch of images side by side. They may differ in size, so they are not stacked."""
    images, targets = zip(*items, strict=True)
    return images, targets


class CocoData(SplitData[CocoImages]):
    """Images with boxes in a training, a validation and a test set, from a folder in COCO's format.

    Args:
        source: `coco:FOLDER` for your own, laid out as in `LAYOUTS`; `digits` for digits on photographs.
        train: Name of the training set in the folder: `train2017` in COCO itself.
        val: Name of the validation set.
        test: Name of the test set; None for `test`, or, where there is none, the validation set.
        batch_size: Images per step.
        flip: Probability that a training image is mirrored; 0 if a mirrored object has another meaning.
        masks: Read masks, for Mask R-CNN.
        keep_empty: Train on images without a box, too.
        workers: Processes that read images.
        seed: Seed of the order and, for `digits`, of the scenes.
        cache: Folder for the digit scenes; they are written once.

    Attributes:
        classes: The names of the categories; label 1 is the first.

    Raises:
        DataError: If the files can't be found or can't be used.
    """

    collate = staticmethod(as_batch)

    def __init__(
        self,
        source: str = "digits",
        *,
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        batch_size: int = 4,
        flip: float = 0.5,
        masks: bool = False,
        keep_empty: bool = False,
        workers: int = 0,
        seed: int = 0,
        cache: Path = Path("runs/data"),
    ) -> None:
        super().__init__(batch_size, workers, seed)
        kind, _, folder = source.partition(":")
        if source == "digits":
            root = cache / f"digit-scenes-{DIGIT_SCENE_SIZE}-{seed}"
            write_digit_scenes(root, DIGIT_SCENES, size=DIGIT_SCENE_SIZE, seed=seed)
        elif kind == "coco" and folder:
            root = Path(folder).expanduser()
        else:
            raise DataError(f"data.source={source}: unknown; give digits or coco:FOLDER")
        augment = [
            v2.RandomPhotometricDistort(p=0.5),
            v2.RandomHorizontalFlip(flip),
            v2.SanitizeBoundingBoxes(labels_getter=_by_box),  # for a crop or rotation that you may add above
        ]
        self.train = CocoImages(
            *find_split(root, train), _transforms(augment), masks=masks, training=True, keep_empty=keep_empty
        )
        self.val = CocoImages(*find_split(root, val), _transforms(), masks=masks)
        if test is None and not any((root / file.format("test")).is_file() for file, _ in LAYOUTS):
            self.test = self.val
        else:
            self.test = CocoImages(*find_split(root, test or "test"), _transforms(), masks=masks)
        self.classes = self.train.classes
        for other in (self.val, self.test):
            if other.classes != self.classes:
                raise DataError(
                    f"{other.annotations}: has the categories {', '.join(other.classes)}, but {self.train.annotations} "
                    f"has {', '.join(self.classes)}; give both the same"
                )
        for images in {id(images): images for images in (self.train, self.val, self.test)}.values():
            for note in images.describe_notes():
                rank_zero_warn(note)

    def items(self, samples: CocoImages, *, training: bool) -> CocoImages:
        """Return the set itself: it reads and transforms its images."""
        return samples


def find_split(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the folder of images of a set."""
    tried = [(folder / annotations.format(split), folder / images.format(split)) for annotations, images in LAYOUTS]
    for file, images in tried:
        if file.is_file() and images.is_dir():
            return file, images
    if not folder.is_dir():
        raise DataError(f"data.source=coco:{folder}: there is no such folder")
    places = "\n".join(f"  {file} with its images in {images}/" for file, images in tried)
    raise DataError(f"data.source=coco:{folder}: there is no set {split!r}. One of these must be there:\n{places}")


def _transforms(augment: Sequence[v2.Transform] = ()) -> v2.Transform:
    """Return the transforms to float tensors. The detectors resize and normalise by themselves."""
    return v2.Compose([v2.ToImage(), *augment, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def _by_box(inputs: Any) -> tuple[Tensor, ...]:
    """Return the tensors that SanitizeBoundingBoxes must shorten when it drops a box, beside masks."""
    _, target = inputs
    return target["labels"], target["iscrowd"]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
