"""The data sets of the examples, on tiny copies in their official layouts, and what is said of bad data."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

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


def write_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    for number in range(6):
        jpeg(data / "images" / f"{number:07}.jpg")
    (data / "variants.txt").write_text("707-320\nDC-3\n")
    for part, numbers in (("train", (0, 1)), ("val", (2, 3)), ("test", (4, 5))):
        lines = [f"{number:07} {('707-320', 'DC-3')[number % 2]}\n" for number in numbers]
        (data / f"images_variant_{part}.txt").write_text("".join(lines))


def write_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = [("fname", object), ("class", np.uint8)]
    for part, path in (
        ("cars_train", folder / "devkit" / "cars_train_annos.mat"),
        ("cars_test", folder / "cars_test_annos_withlabels.mat"),
    ):
        names = [jpeg(folder / part / f"{number:05}.jpg").name for number in range(20)]
        savemat(path, {"annotations": np.array([(name, 1 + i % 2) for i, name in enumerate(names)], dtype=kind)})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})


def write_cub(root: Path) -> None:
    folder = root / "CUB_200_2011"
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    files = [f"{names[number % 2]}/{number}.jpg" for number in range(22)]
    for file in files:
        jpeg(folder / "images" / file)
    for name, values in (
        ("classes", names),
        ("images", files),
        ("image_class_labels", [1 + number % 2 for number in range(22)]),
        ("train_test_split", [int(number < 20) for number in range(22)]),
    ):
        (folder / f"{name}.txt").write_text("".join(f"{n} {value}\n" for n, value in enumerate(values, 1)))


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {"data": np.zeros((20, 3072), np.uint8), "labels": [number % 10 for number in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {number}" for number in range(10)]}))


def write_fashion_mnist(root: Path) -> None:
    for part, count in (("train", 100), ("t10k", 10)):
        images = struct.pack(">4i", 2051, count, 28, 28) + bytes(count * 28 * 28)
        labels = struct.pack(">2i", 2049, count) + bytes(number % 10 for number in range(count))
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(labels)  # packed or not


def write_imagenet(root: Path) -> None:
    names = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",)}
    torch.save((names, ["n01440764", "n01443537"]), root / "meta.bin")
    for wnid in names:
        for part, count in (("train", 3), ("val", 2)):
            for number in range(count):
                jpeg(root / part / wnid / f"{number}.JPEG")


@pytest.mark.parametrize(
    ("name", "write", "classes", "labels"),
    [
        ("aircraft", write_aircraft, ["707-320", "DC-3"], [[0, 1], [0, 1], [0, 1]]),
        ("cars", write_cars, ["Audi", "BMW"], [[0] * 9 + [1] * 9, [0, 1], [0] * 10 + [1] * 10]),
        ("cub", write_cub, ["001.Black_footed_Albatross", "002.Laysan_Albatross"], [[0] * 9 + [1] * 9, [0, 1], [0, 1]]),
        ("imagenet", write_imagenet, ["tench", "goldfish"], [[0, 0, 0, 1, 1, 1], [0, 1], [0, 1]]),
    ],
)
def test_photographs_are_found_in_the_official_layout(
    name: str, write: object, classes: Sequence[str], labels: list[list[int]], tmp_path: Path
) -> None:
    write(tmp_path)  # type: ignore[operator]
    source = read_source(f"{name}:{tmp_path}", seed=0)
    assert (list(source.classes), labels_of(source)) == (classes, labels)
    data = ImageData(f"{name}:{tmp_path}", image_size=16, batch_size=2)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("name", "write"), [("cifar10", write_cifar10), ("fashion-mnist", write_fashion_mnist)])
def test_small_images_are_found_in_the_official_layout(
    name: str, write: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)  # type: ignore[operator]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    data = ImageData(f"{name}:{tmp_path}", image_size=16, batch_size=10, eval_limit=10)
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


def cub_of_another_class(root: Path) -> None:
    write_cub(root)
    path = root / "CUB_200_2011" / "image_class_labels.txt"
    path.write_text(path.read_text().replace("7 1\n", "7 201\n", 1))


def cub_without_a_line(root: Path) -> None:
    write_cub(root)
    path = root / "CUB_200_2011" / "train_test_split.txt"
    path.write_text(path.read_text().replace("7 1\n", "", 1))


@pytest.mark.parametrize(
    ("source", "write", "message"),
    [
        ("birds:{}", None, "unknown; give one of elpv, fashion-mnist, photos, imagefolder:PATH"),
        ("cub", None, "say where it lies, as --data cub:PATH"),
        ("cub:{}/nowhere", None, "there is no file or folder .*nowhere"),
        ("cub:{}", None, "there is no .*classes.txt; give the folder that"),
        (
            "cub:{}",
            cub_of_another_class,
            "image_class_labels.txt gives image 7 the class 201, but .* 2 classes: 1 to 2",
        ),
        ("cub:{}", cub_without_a_line, "train_test_split.txt has no line for image 7, 001.*/6.jpg"),
        ("imagefolder:{}", None, "Couldn't find any class folder in .* sub-folder of images"),
        ("aircraft:{}", None, "Dataset not found.*it must hold fgvc-aircraft-2013b/data/"),
        ("cars:{}", None, "Dataset not found.*it must hold stanford_cars/"),
        ("cifar10:{}", None, "Dataset not found.*it must hold cifar-10-batches-py/"),
        ("imagenet:{}", None, "it must hold train/, val/ and meta.bin"),
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
