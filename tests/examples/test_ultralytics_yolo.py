"""Tune mode in Ultralytics YOLO: frozen BatchNorms' losses, less memory; EMA, validation and predict as ever.

Its licence is AGPL-3.0, so no extra of this project installs it. Without it these tests are skipped:
`pip install ultralytics` runs them. The network is built from its YAML file, nothing is downloaded.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.frozen_by_hand import freeze
from helpers.model_checks import randomized
from helpers.torch_settings import apply_torch_settings
from helpers.watched_run import WatchedRun
from PIL import Image
from torch import nn

from examples.other_trainers.ultralytics_yolo import add_tune_mode
from lightning_convbn import get_mode

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries deprecate is no failure of these tests


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The library, offline and with a settings folder of its own. What it changes in other libraries is put back."""
    folder = str(tmp_path_factory.mktemp("settings"))
    saves, printed, printed_by_numpy = torch.save, copy.copy(torch._tensor_str.PRINT_OPTS), np.get_printoptions()
    with mock.patch.dict(os.environ, YOLO_CONFIG_DIR=folder, YOLO_OFFLINE="true"):
        yield pytest.importorskip("ultralytics", reason="not in our extras, as its licence is AGPL-3.0; pip install it")
    torch.save, torch._tensor_str.PRINT_OPTS = saves, printed
    np.set_printoptions(**printed_by_numpy)
    apply_torch_settings()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright squares on noise, as a folder in the format of Ultralytics; its YAML file."""
    root = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for folder in ("images", "labels"):
            (root / folder / part).mkdir(parents=True)
        for number in range(count):
            image = random.integers(0, 80, (64, 64, 3), dtype=np.uint8)
            left, top = random.integers(0, 40, 2)
            image[top : top + 24, left : left + 24] = 220
            Image.fromarray(image).save(root / "images" / part / f"{number}.png")
            box = f"0 {(left + 12) / 64} {(top + 12) / 64} 0.375 0.375\n"  # class, centre and size
            (root / "labels" / part / f"{number}.txt").write_text(box)
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [square]\n")
    return root / "data.yaml"


@pytest.fixture(scope="module")
def pretrained(ultralytics: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLO with statistics that look trained, saved as one that was trained."""
    torch.manual_seed(0)
    model = ultralytics.YOLO("yolov8n.yaml")
    model.model.args = dict(model.overrides)
    randomized(model.model)
    path = tmp_path_factory.mktemp("pretrained") / "pretrained.pt"
    model.save(path)
    return path


class Training:
    """One epoch of a YOLO.

    Attributes:
        model: The YOLO, which has loaded the best checkpoint by now.
        run: What was seen of the network that was trained.
        trainer: The trainer of Ultralytics.
        fused: How far a fused copy of the network in training deviates from the network in eval state.
    """

    def __init__(self, yolo: Any, data: Path, prepare: Callable[[Any], object]) -> None:
        self.model = yolo
        yolo.add_callback("on_pretrain_routine_end", self._begin)
        prepare(yolo)
        yolo.add_callback(
            "on_train_batch_start", lambda trainer: self.run.look(trainer.model, torch.rand(2, 3, 64, 64))
        )
        yolo.add_callback("on_train_batch_end", lambda trainer: self.run.losses.append(trainer.loss.item()))
        yolo.add_callback("on_train_epoch_end", self._fuse_a_copy)
        yolo.train(
            data=str(data),
            project=str(data.parent / "training"),
            epochs=1,
            imgsz=64,
            batch=2,
            device="cpu",
            workers=0,
            amp=False,
            plots=False,
            optimizer="SGD",
            lr0=0.001,
            warmup_epochs=0,
        )

    def _begin(self, trainer: Any) -> None:
        self.trainer = trainer
        self.run = WatchedRun(trainer.model.train())

    def _fuse_a_copy(self, trainer: Any) -> None:
        trainer.model.eval()
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            expected = trainer.model(images)[0]
            fused = copy.deepcopy(trainer.model).fuse(verbose=False)
            assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
            self.fused = ((fused(images)[0] - expected).abs().max() / expected.abs().max()).item()
        trainer.model.train()


def test_ultralytics(ultralytics: Any, pretrained: Path, data: Path) -> None:
    def freeze_by_hand(yolo: Any) -> None:
        yolo.add_callback("on_train_start", lambda trainer: freeze(trainer.model))

    frozen = Training(ultralytics.YOLO(pretrained), data, freeze_by_hand)
    tune = Training(ultralytics.YOLO(pretrained), data, add_tune_mode)
    tune.run.assert_as_frozen_by_hand(frozen.run, steps=4, saved=0.2, tolerance=1e-4)
    assert tune.fused < 1e-4

    averages = [training.trainer.ema.ema for training in (tune, frozen)]
    for name, tensor in averages[0].state_dict().items():
        torch.testing.assert_close(tensor, averages[1].state_dict()[name], rtol=1e-3, atol=1e-4)
    assert any(
        not torch.equal(average, tune.trainer.model.get_parameter(name))
        for name, average in averages[0].named_parameters()
    )
    checkpoint = torch.load(tune.trainer.best, weights_only=False)["model"]
    for model in (averages[0], checkpoint, tune.model.model):
        assert not [module for module in model.modules() if type(module).__module__.startswith("lightning_convbn")]

    assert tune.trainer.metrics == pytest.approx(frozen.trainer.metrics, rel=1e-2, abs=1e-3)
    validated = [
        training.model.val(data=str(data), project=str(data.parent / "validation"), imgsz=64, plots=False)
        for training in (tune, frozen)
    ]
    assert validated[0].results_dict == pytest.approx(validated[1].results_dict, rel=1e-2, abs=1e-3)
    image = data.parent / "images" / "val" / "0.png"
    (ours,), (theirs,) = (training.model.predict(image, imgsz=64, conf=1e-3) for training in (tune, frozen))
    assert len(ours.boxes) > 0
    torch.testing.assert_close(ours.boxes.data, theirs.boxes.data, rtol=1e-2, atol=1e-2)


def test_the_code_on_the_page_trains(
    ultralytics: Any, pretrained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is docs/use/other-trainers.md. Its 20 epochs are one here, of small images."""
    page = (ROOT / "docs" / "use" / "other-trainers.md").read_text()
    (block,) = re.findall(r"```python\n(from ultralytics import .*?)```", page, re.DOTALL)
    small = block.replace(
        "epochs=20", "epochs=1, imgsz=64, batch=2, workers=0, device='cpu', plots=False, project=str(folder)"
    )
    assert small != block
    shutil.copy(pretrained, tmp_path / "yolov8n.pt")
    shutil.copy(data, tmp_path / "my_images.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "other_trainers")
    exec(compile(small, "docs", "exec"), namespace := {"folder": tmp_path})
    assert (tmp_path / "train" / "weights" / "best.pt").exists()
    assert get_mode(namespace["model"].trainer.model) == "train"
