"""The data sets of the examples, on tiny copies in their official layouts, and what is said of bad data."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.data.images_with_classes import ImageData
from examples.data.images_with_masks import MaskData
from examples.data.sources import DataError, Source, read_source, readable


def jpeg(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((40, 30), 50 + value).convert("RGB").save(path)
    return path


def truncated(path: Path) -> Path:
    jpeg(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def labels_of(source: Source) -> list[list[int]]:
    return [sorted(sample.label for sample in part) for part in source.sets]


def write_fashion_mnist(root: Path) -> None:
    for part, count in (("train", 100), ("t10k", 10)):
        images = struct.pack(">4i", 2051, count, 28, 28) + bytes(count * 28 * 28)
        labels = struct.pack(">2i", 2049, count) + bytes(number % 10 for number in range(count))
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(labels)  # packed or not


def test_fashion_mnist_is_found_in_the_official_layout(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    data = ImageData(f"fashion-mnist:{tmp_path}", image_size=16, batch_size=10, eval_limit=10)
    assert [len(data.train), len(data.val), len(data.test)] == [90, 10, 10]
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (10, 3, 16, 16)
    assert sorted(labels.tolist()) == list(range(10))


def test_a_list_of_images_is_read(tmp_path: Path) -> None:
    rows = [f"{jpeg(tmp_path / f'{n}.jpg').name},{'ab'[n % 2]},{('train', 'val', 'test')[n // 2]}" for n in range(6)]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["image,label,set", *rows]))
    assert labels_of(read_source(f"csv:{path}", seed=0)) == [[0, 1]] * 3


def bad_csv(text: str) -> object:
    return lambda root: (root / "list.csv").write_text(text)


@pytest.mark.parametrize(
    ("source", "write", "message"),
    [
        ("birds:{}", None, "unknown; give one of elpv, fashion-mnist, imagefolder:PATH"),
        ("csv", None, "say where it lies, as --data csv:PATH"),
        ("csv:{}/nowhere", None, "there is no file or folder .*nowhere"),
        ("imagefolder:{}", None, "Couldn't find any class folder in .* sub-folder of images"),
        ("fashion-mnist:{}", None, "Dataset not found.*it must hold train-images-idx3-ubyte"),
        ("csv:{}/list.csv", bad_csv("image,class\na.jpg,b\n"), "list.csv: no column 'label'; .* has image, class"),
        ("csv:{}/list.csv", bad_csv("image,label\n"), "list.csv: no line but the first"),
        ("csv:{}/list.csv", bad_csv("image,label\na.jpg,b\na.jpg\n"), "list.csv: line 3 has no label"),
        ("csv:{}/list.csv", bad_csv("image,label,set\na.jpg,b,dev\n"), "line 2: set is 'dev'; give train, val or test"),
    ],
)
def test_bad_data_is_refused_by_name(source: str, write: object, message: str, tmp_path: Path) -> None:
    if write is not None:
        write(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        ImageData(source.format(tmp_path))


def folder_with_a_bad_image(root: Path) -> Path:
    for name in ("cats", "dogs"):
        for number in range(10):
            jpeg(root / name / f"{number}.jpg", number)
    return truncated(root / "cats" / "bad.jpg")


def test_a_bad_image_is_named_skipped_or_met_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folder_with_a_bad_image(tmp_path)
    samples = [sample for part in read_source(f"imagefolder:{tmp_path}", 0).sets for sample in part]
    with pytest.raises(DataError, match=f"1 of 21 images can't be read; .*bad_images=skip:\n  {bad}: "):
        readable(samples, "error")
    assert [sample for sample in samples if sample.image != bad] == readable(samples, "skip")
    assert f"skipped 1 of 21 images, which can't be read:\n  {bad}: " in capsys.readouterr().err
    data = ImageData(f"imagefolder:{tmp_path}", batch_size=2, bad_images="unchecked")
    (index,) = (n for n, sample in enumerate(samples) if sample.image == bad)
    with pytest.raises(DataError, match=f"{bad} can't be read as an image"):
        data.items(samples, training=False)[index]


def masked_folder(root: Path, *, size: tuple[int, int] = (40, 30), value: int = 1) -> Path:
    for part in ("train", "val", "test"):
        for number in range(2):
            jpeg(root / part / "images" / f"{number}.jpg")
            mask = np.zeros((30, 40), np.uint8)
            mask[5:10] = 1
            (root / part / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(root / part / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("nothing\nsomething\n")
    Image.new("L", size, value).save(root / "val" / "masks" / "1.png")
    return root


def test_masks_are_read_with_their_images(tmp_path: Path) -> None:
    data = MaskData(masked_folder(tmp_path), image_size=24, batch_size=2)
    images, masks = next(iter(data.val_dataloader()))
    assert (images.shape, masks.shape, masks.dtype) == ((2, 3, 24, 24), (2, 24, 24), torch.int64)
    assert masks[0].unique().tolist() == [0, 1]
    rare, common = data.class_weights[1], data.class_weights[0]
    assert rare == pytest.approx(common * 5**0.5)  # 5 of 30 rows


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: masked_folder(root, value=2),
            "val/masks/1.png has pixels of class 2, but classes.txt has 2 classes",
        ),
        (lambda root: masked_folder(root, size=(30, 40)), "val/masks/1.png is 30 x 40 pixels, its image 40 x 30"),
        (lambda root: (masked_folder(root) / "test/masks/0.png").unlink(), "test/images/0.jpg has no mask; .*0.png"),
        (lambda root: (masked_folder(root) / "classes.txt").unlink(), "there is no .*classes.txt; write the name"),
        (lambda root: (masked_folder(root) / "test/masks/0.png").write_text("no"), "test/masks/0.png can't be read"),
        (lambda root: truncated(masked_folder(root) / "train/images/0.jpg"), "train/images/0.jpg: image file is trunc"),
        (lambda root: (root / "classes.txt").write_text("a\nb\n"), "train/images holds no image"),
    ],
)
def test_bad_masks_are_refused_by_name(damage: object, message: str, tmp_path: Path) -> None:
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        MaskData(tmp_path, batch_size=2)
