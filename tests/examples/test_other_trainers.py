"""The examples of other trainers, each in the real library: frozen BatchNorms' losses, less memory, a plain model.

They are compared with the same training of the same library, with the BatchNorms frozen by plain PyTorch. Models are
built from a config, with statistics that look trained. Nothing is downloaded. `docs/use/other-trainers.md` shows the
files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers.frozen_by_hand import freeze
from helpers.model_checks import randomized
from helpers.tiny_training import differing, state_of
from helpers.transformers_models import mobilenet_v2, resnet, rt_detr
from helpers.watched_run import WatchedRun
from lightning.fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.other_trainers import fabric, timm_loop
from examples.other_trainers.hugging_face import TuneMode
from lightning_convbn import Mode, find_conv_bn_pairs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "other_trainers"
PAGE = ROOT / "docs" / "use" / "other-trainers.md"


# The hook for MMEngine is a file to import, so the page says how to name it.
SHOWN = [file for file in sorted(FOLDER.glob("[!_]*.py")) if file.stem != "mmengine_hook"]


@pytest.mark.parametrize("file", SHOWN, ids=lambda file: file.stem)
def test_the_page_shows_the_file_and_it_is_short(file: Path) -> None:
    (shown,) = re.findall(
        rf'```python title="examples/other_trainers/{file.name}"\n(.*?)```', PAGE.read_text(), re.DOTALL
    )
    assert shown == file.read_text()
    assert sum(bool(line.strip()) for line in shown.splitlines()) <= 20


def small_resnet() -> nn.Module:
    """A ResNet of timm with statistics that look trained, in float64."""
    torch.manual_seed(0)
    return randomized(timm.create_model("resnet18", num_classes=3)).double().train()


def random_images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 64, 64, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (count,), generator=generator)


class WatchedLoader(DataLoader[tuple[Tensor, ...]]):
    """Four batches of two images. Before it gives one, it looks at the model."""

    def __init__(self, run: WatchedRun) -> None:
        super().__init__(TensorDataset(*random_images(8)), batch_size=2)
        self.run = run

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.run.look(self.run.model, batch[0])
            yield batch


def test_fabric() -> None:
    def run(network: nn.Module, mode: Mode) -> WatchedRun:
        run = WatchedRun(network)
        run.losses = fabric.train(Fabric(accelerator="cpu", devices=1), network, WatchedLoader(run), mode)
        return run

    run(small_resnet(), "tune").assert_as_frozen_by_hand(run(freeze(small_resnet()), "train"), steps=4, saved=0.4)


def test_timm() -> None:
    averages = []

    def run(network: nn.Module, mode: Mode) -> WatchedRun:
        run = WatchedRun(network)
        averages.append(ModelEmaV3(network, decay=0.9))
        run.losses = timm_loop.train(network, averages[-1], WatchedLoader(run), mode)
        return run

    tune = run(small_resnet(), "tune")
    tune.assert_as_frozen_by_hand(run(freeze(small_resnet()), "train"), steps=4, saved=0.4)
    images, _ = random_images(2)
    ours, theirs = (average.module for average in averages)
    assert not torch.equal(ours(images), tune.model.eval()(images))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-8, atol=1e-8)
    assert str(ours) == str(tune.model)


def trained_rt_detr() -> nn.Module:
    """A small detector with ordinary BatchNorms in its backbone, too."""
    return rt_detr(blocks=1, freeze_backbone_batch_norms=False)


def with_classes(count: int) -> list[dict[str, Any]]:
    images, labels = random_images(count)
    return [{"pixel_values": image, "labels": label % 2} for image, label in zip(images, labels, strict=True)]


def with_boxes(count: int) -> list[dict[str, Any]]:
    """What the detector is given: a box or two in each image."""
    images, labels = random_images(count)
    generator = torch.Generator().manual_seed(2)
    boxes = torch.rand(count, 2, 4, generator=generator, dtype=torch.float64) / 4 + 0.3
    targets = [
        {"class_labels": label.repeat(1 + index % 2) % 2, "boxes": boxes[index, : 1 + index % 2]}
        for index, label in enumerate(labels)
    ]
    return [{"pixel_values": image, "labels": target} for image, target in zip(images, targets, strict=True)]


def as_batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Put examples together; each keeps its own boxes."""
    labels = [example["labels"] for example in examples]
    images = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": images, "labels": labels if isinstance(labels[0], dict) else torch.stack(labels)}


@pytest.mark.parametrize(
    ("build", "data", "saved"),
    [
        pytest.param(resnet, with_classes, 0.3, id="resnet", marks=pytest.mark.slow),
        pytest.param(mobilenet_v2, with_classes, 0.3, id="mobilenet_v2"),
        pytest.param(trained_rt_detr, with_boxes, 0.1, id="rt_detr", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what other libraries deprecate is no failure of these tests
def test_hugging_face(
    build: Callable[[], nn.Module], data: Callable[[int], list[dict[str, Any]]], saved: float, tmp_path: Path
) -> None:
    class RecordingTrainer(transformers.Trainer):
        run: WatchedRun

        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            self.run.look(model, **inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.run.losses.append(loss.item())
            return loss

    def run(name: str, change: Callable[[nn.Module], nn.Module], *callbacks: Any) -> WatchedRun:
        torch.manual_seed(0)
        network = change(randomized(build()).double().train())
        options = transformers.TrainingArguments(
            str(tmp_path / name),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
        )
        trainer = RecordingTrainer(network, options, as_batch, data(8), data(2), callbacks=list(callbacks))
        trainer.run = WatchedRun(network)
        trainer.train()
        network.train()  # the last evaluation left it in eval state
        evaluated.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
        return trainer.run

    evaluated: list[list[float]] = []
    frozen = run("frozen", freeze)
    images, _ = random_images(2)
    recorded = find_conv_bn_pairs(randomized(build()).double().train(), example_inputs=(images,))
    tune = run("tune", lambda network: network, TuneMode(recorded if build is mobilenet_v2 else None))
    tune.assert_as_frozen_by_hand(frozen, steps=4, saved=saved)
    assert len(evaluated[0]) == 2
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-8)
    saved_model = type(tune.model).from_pretrained(tmp_path / "tune" / "checkpoint-4", dtype=torch.float64)
    assert differing(state_of(saved_model), state_of(tune.model)) == []
