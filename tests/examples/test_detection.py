"""The detection template: every architecture trains from the command line; bad data are told before training starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.tiny_training import LIGHTNING_SAYS, make_trainer
from PIL import Image

from examples.data import digit_scenes, images_with_boxes
from examples.data.images_with_boxes import CocoData, CocoImages, find_split
from examples.data.sources import DataError
from examples.templates import detection
from examples.templates.networks import detectors

pytestmark = [
    *LIGHTNING_SAYS,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),  # pycocotools
]

SIZE = 64
SCENES = {"train": 4, "val": 2, "test": 2}
TINY = [
    "--model.pretrained=false",
    f"--model.image_size={SIZE}",
    "--model.channels=64",
    "--convbn.freeze_untrained=true",
    "--data.batch_size=2",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scenes = tmp_path / "scenes"
    digit_scenes.write_digit_scenes(scenes, SCENES, size=SIZE, seed=0)
    return scenes


def edit(folder: Path, change: Callable[[dict[str, Any]], object], split: str = "train") -> None:
    file = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def read(folder: Path, **options: Any) -> CocoImages:
    return CocoImages(*find_split(folder, "train"), images_with_boxes._transforms(), **options)


def type_in(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["detection.py", *args])
    detection.main()


@pytest.mark.parametrize("architecture", get_args(detectors.Architecture))
def test_each_architecture_trains_and_is_tested(
    architecture: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    places = [f"--data.source=coco:{folder}", f"--trainer.default_root_dir={run}", f"--checkpoint.dirpath={run}"]
    results = f"--results={tmp_path / 'scores.json'}"
    type_in(monkeypatch, "fit", f"--model.architecture={architecture}", *places, *TINY, results)
    assert "4 training images in batches of 2, 2 to validate, 2 to test" in capsys.readouterr().out
    (scores,) = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert 0 <= scores["test_map"] <= scores["test_map_50"] <= 1
    assert ("test_mask_map" in scores) == (architecture == "maskrcnn")
    with Image.open(run / "predictions.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20) or ()) > 1000
    assert (run / "best.ckpt").is_file()


def test_boxes_and_masks_are_exactly_the_ink(folder: Path) -> None:
    images = read(folder, masks=True)
    assert images.classes == [str(digit) for digit in range(10)]
    for image, target in images:
        assert image.dtype == torch.float32
        assert image.max() <= 1
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize(("annotations", "images"), images_with_boxes.LAYOUTS)
def test_finds_the_usual_layouts(annotations: str, images: str, folder: Path, tmp_path: Path) -> None:
    file, pictures = (
        tmp_path / "other" / annotations.format("train2017"),
        tmp_path / "other" / images.format("train2017"),
    )
    pictures.parent.mkdir(parents=True)
    (folder / "images").rename(pictures)
    file.parent.mkdir(exist_ok=True)
    (folder / "annotations" / "instances_train.json").rename(file)
    assert find_split(tmp_path / "other", "train2017") == (file, pictures)
    assert len(CocoImages(file, pictures, images_with_boxes._transforms())) == SCENES["train"]


def test_labels_count_from_one_whatever_the_ids(folder: Path) -> None:
    def renumber(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["id"] = 90 - 5 * category["id"]
        for entry in content["annotations"]:
            entry["category_id"] = 90 - 5 * entry["category_id"]

    before = [target["labels"] for _, target in read(folder)]
    edit(folder, renumber)
    images = read(folder)
    assert images.classes == [str(digit) for digit in reversed(range(10))]
    for (_, target), labels in zip(images, before, strict=True):
        assert (11 - target["labels"]).tolist() == labels.tolist()


# ------------------------------------------------------------------------------------------------------- bad data


def first_image(folder: Path) -> Path:
    return folder / "images" / "train_0000.jpg"


def cut_short(folder: Path) -> None:
    content = first_image(folder).read_bytes()
    first_image(folder).write_bytes(content[: len(content) // 2])


def empty(folder: Path) -> None:
    for file in sorted(folder.rglob("*.*")):
        file.unlink()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty folder": (empty, r"data\.source=coco:.*scenes: there is no set 'train'\. One of these must be there:\n"),
    "no annotation file": (
        lambda folder: (folder / "annotations" / "instances_val.json").unlink(),
        r"no set 'val'\. One of these must be there:\n  .*instances_val\.json with its images in .*val/",
    ),
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "scenes: there is no such folder"),
    "no JSON": (
        lambda folder: (folder / "annotations" / "instances_train.json").write_text("{"),
        r"instances_train\.json: not an annotation file in COCO's format \(JSONDecodeError: ",
    ),
    "no categories": (
        lambda folder: edit(folder, lambda content: content.pop("categories")),
        r"instances_train\.json: not an annotation file in COCO's format \(KeyError: 'categories'\)",
    ),
    "corrupt image": (
        lambda folder: first_image(folder).write_bytes(b"no image"),
        r"instances_train\.json: 1 of its 4 images can't be used: .*train_0000\.jpg: cannot identify.*Mend them",
    ),
    "image cut short": (cut_short, r"train_0000\.jpg: .*truncated"),
    "image missing": (
        lambda folder: first_image(folder).unlink(),
        r"train_0000\.jpg: .*No such file",
    ),
    "image of another size": (
        lambda folder: Image.new("RGB", (30, 20)).save(first_image(folder)),
        r"train_0000\.jpg: 30 x 20 pixels, not 64 x 64 as stated",
    ),
    "unknown category": (
        lambda folder: edit(folder, lambda content: content["annotations"][0].update(category_id=11)),
        r"instances_train\.json: annotation 1 has category_id 11, but `categories` lists 1, 2, .* 10; add it",
    ),
    "unknown image": (
        lambda folder: edit(folder, lambda content: content["annotations"][0].update(image_id=99)),
        r"annotation 1 belongs to image_id 99, which `images` does not list",
    ),
    "bad box": (
        lambda folder: edit(folder, lambda content: content["annotations"][0].update(bbox=[1, 2, float("nan"), 4])),
        r"annotation 1 has bbox \[1, 2, nan, 4\]; give \[left, top, width, height\] in pixels",
    ),
    "no segmentation": (
        lambda folder: edit(folder, lambda content: content["annotations"][0].pop("segmentation")),
        r"annotation 1 has no segmentation, which Mask R-CNN learns from",
    ),
    "other categories": (
        lambda folder: edit(folder, lambda content: content["categories"].append({"id": 11, "name": "ten"}), "val"),
        r"instances_val\.json: has the categories 0, .*, ten, but .*instances_train\.json has 0, .* 9; give both",
    ),
    "no usable box": (
        lambda folder: edit(folder, lambda content: [one.update(bbox=[0, 0, 0, 5]) for one in content["annotations"]]),
        r"instances_train\.json: not one box that can be used\n  .* boxes with less than a pixel .* annotation 1 in",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_refused_by_name(name: str, folder: Path) -> None:
    spoil, message = BAD[name]
    spoil(folder)
    with pytest.raises(DataError, match=message):
        CocoData(f"coco:{folder}", masks=True)


def test_command_ends_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_image(folder).write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"^error: .*images can't be used: .*train_0000\.jpg"):
        type_in(monkeypatch, "fit", f"--data.source=coco:{folder}", *TINY)


def test_without_a_test_set_the_validation_set_is_tested_on(folder: Path) -> None:
    assert len(CocoData(f"coco:{folder}", val="train").test) == SCENES["test"]
    (folder / "annotations" / "instances_test.json").unlink()
    data = CocoData(f"coco:{folder}")
    assert data.test is data.val
    with pytest.raises(DataError, match="no set 'test'"):
        CocoData(f"coco:{folder}", test="test")


def test_unknown_source_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.source=voc:there: unknown; give digits or coco:FOLDER"):
        CocoData("voc:there")


def test_model_with_other_classes_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    model = detection.Detector(["0", "1"], pretrained=False, image_size=SIZE, channels=8)
    with pytest.raises(DataError, match=r"the data have 10 classes \(0, .*\), but the model has 2 \(0, 1\); build the"):
        make_trainer(default_root_dir=tmp_path).fit(model, CocoData(f"coco:{folder}"))


def test_odd_boxes_are_clipped_or_left_out_counted_and_named(folder: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["annotations"] = [content["annotations"][0] | {"image_id": 1, "id": number} for number in range(1, 7)]
        boxes = [[-5, 10, 20, 20], [50, 50, 20, 20], [70, 0, 10, 10], [10, 10, 0, 9], [1, 1, 9, 9], [2, 2, 8, 8]]
        for entry, box in zip(content["annotations"], boxes, strict=True):
            entry["bbox"] = box
        content["annotations"][4]["iscrowd"] = 1

    edit(folder, spoil)
    with pytest.warns(UserWarning, match="instances_train") as warned:
        data = CocoData(f"coco:{folder}", flip=0.0)
    said = "\n".join(str(warning.message) for warning in warned)
    assert "2 boxes are clipped to their image: annotation 1 in train_0000.jpg, annotation 2 in train_0000.jpg" in said
    assert "2 boxes with less than a pixel inside their image are left out: annotation 3 in" in said
    assert "1 crowds are left out: annotation 5 in train_0000.jpg" in said
    assert "3 images without a box are left out: train_0001.jpg, train_0002.jpg, train_0003.jpg" in said
    ((_, target),) = data.train
    assert target["boxes"].tolist() == [[0, 10, 15, 30], [50, 50, 64, 64], [2, 2, 10, 10]]
    # For evaluation crowds count as such, and images without a box show false alarms.
    images = read(folder)
    assert len(images) == 4
    assert images[0][1]["iscrowd"].tolist() == [0, 0, 1, 0]
    assert images[1][1]["boxes"].shape == (0, 4)
