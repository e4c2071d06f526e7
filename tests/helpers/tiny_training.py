"""A tiny LightningModule with its data, and a Trainer without frills, for tests that run Lightning for real."""

from __future__ import annotations

import csv
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers import comparing
from lightning_convbn import ConvBNModeCallback, get_mode

BATCHES_PER_EPOCH = 3

# What Lightning 2.6 says to such small runs. Everything else, and every warning of ours, is an error.
LIGHTNING_SAYS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        r".isinstance\(treespec, LeafSpec\). is deprecated",
        r"Found \d+ module\(s\) in eval mode",
        r"The '\w+_dataloader' does not have many workers",
    )
]
RESUMING_SAYS = [
    *LIGHTNING_SAYS,
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:Be aware that when using `ckpt_path`"),
]

# Before 2.6 Lightning trusted every checkpoint and had no such argument.
TRUSTED = {"weights_only": False} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}


def conv_bn(inputs: int, outputs: int) -> nn.Sequential:
    """One block of a convolutional network."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def pretend_trained(model: nn.Module, seed: int = 0) -> None:
    """Give every BatchNorm the statistics, weight and bias of one that has seen data."""
    generator = torch.Generator().manual_seed(seed)
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            assert bn.running_mean is not None
            assert bn.running_var is not None
            for tensor, low, high in (
                (bn.running_mean, -0.5, 0.5),
                (bn.running_var, 0.5, 2.0),
                (bn.weight.data, 0.5, 1.5),
                (bn.bias.data, -0.5, 0.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


class Backbone(nn.Module):
    """Three blocks that can be folded, and a BatchNorm behind a ReLU that can't; 8 features per image."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.middle = conv_bn(8, 8)
        self.lone = nn.BatchNorm2d(8)
        self.last = conv_bn(8, 8)
        self.dropout = nn.Dropout(dropout)
        pretend_trained(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.last(self.lone(self.middle(self.stem(images))))
        return self.dropout(features).mean((2, 3))


def images_and_targets(batches: int = BATCHES_PER_EPOCH, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of two random images and what a network should say about them, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2 * batches, 3, 8, 8, generator=generator)
    targets = torch.randn(2 * batches, 4, generator=generator)
    return DataLoader(TensorDataset(images, targets), batch_size=2, shuffle=shuffle)


class ResumableLoader(DataLoader[tuple[Tensor, ...]]):
    """Goes on with the batch at which a checkpoint was written."""

    given = 0
    skipped = 0

    def __iter__(self) -> Iterator[Any]:
        self.given, first, self.skipped = self.skipped, self.skipped, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= first:
                self.given += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["given"]


class BoringSteps:
    """What a LightningModule does in each step, without the base class, which comes from either of two packages.

    Attributes:
        modes: Stage -> the mode in force in each of its steps.
        losses: Stage -> the loss of each of its steps.
    """

    backbone: nn.Module
    head: nn.Module
    learning_rate = 0.05
    shuffle = False

    def build(self, make_backbone: Callable[[], nn.Module] = Backbone) -> None:
        """Make a network that always has the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Linear(8, 4)
            self.backbone = make_backbone()
        self.forget()

    def forget(self) -> None:
        """Start recording anew."""
        self.modes: dict[str, list[str]] = defaultdict(list)
        self.losses: dict[str, list[float]] = defaultdict(list)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def step(self, stage: str, batch: list[Tensor]) -> Tensor:
        images, targets = batch
        self.modes[stage].append(get_mode(self))
        loss = F.mse_loss(self(images), targets)
        self.losses[stage].append(loss.item())
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.step("fit", batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Validate; a checkpoint or early stopping may monitor ``loss``."""
        self.log("loss", self.step("sanity" if self.trainer.sanity_checking else "validate", batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.step("test", batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.modes["predict"].append(get_mode(self))
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use an optimizer with a state, so that resuming has something to lose."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return images_and_targets(shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return images_and_targets(batches=1)

    test_dataloader = predict_dataloader = val_dataloader


class BoringModule(BoringSteps, LightningModule):
    """The tiny LightningModule: a `Backbone` and a linear head."""

    def __init__(self, make_backbone: Callable[[], nn.Module] = Backbone) -> None:
        super().__init__()
        self.build(make_backbone)


def module_of(package: Any) -> Any:
    """Make the tiny LightningModule of one of the two packages."""

    class Module(BoringSteps, package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.build()

    return Module()


class OwnNorm(BoringSteps, LightningModule):
    """A LightningModule that has a convolution and a BatchNorm of its own, not in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.after = conv_bn(4, 4)
        pretend_trained(self)
        self.forget()

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.bn(self.conv(images))).mean((2, 3))


class FindsBatchSize(BoringModule):
    """Has a batch size to be found."""

    batch_size = 1

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(images_and_targets(batches=4).dataset, batch_size=self.batch_size)


class PeekingBackbone(Backbone):
    """Adds what a convolution put out to the features, by a hook that no proof sees."""

    peeks = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.last[0].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen[:] = [output]

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        return features + self.seen.pop().mean((2, 3)) if self.peeks else features


class PrintedLines(ProgressBar):
    """A progress bar that shows nothing but keeps what is printed through it."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.text += " ".join(map(str, args)) + "\n"

    def disable(self) -> None:
        """Show nothing still."""

    def enable(self) -> None:
        """Show nothing in any case."""


def make_trainer(*callbacks: Any, trainer_class: Any = Trainer, **options: Any) -> Any:
    """Make a Trainer on the CPU that writes nothing unless it is asked to."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
    }
    return trainer_class(callbacks=list(callbacks), **{**quiet, **options})


def quick(mode: Any = "tune", **arguments: Any) -> ConvBNModeCallback:
    """Make a callback that does not count memory: the garbage collection takes longer than the tiny run."""
    return ConvBNModeCallback(mode, log_memory=False, **arguments)


def half_in_eval() -> BoringModule:
    """Make a module some of whose parts are in eval state, as a user may have put them."""
    module = BoringModule()
    module.backbone.middle.eval()
    module.backbone.last[1].eval()
    return module


def with_fresh_norm() -> BoringModule:
    """Make a module whose middle BatchNorm has never been trained."""
    module = BoringModule()
    module.backbone.middle[1].reset_running_stats()
    return module


class Snapshot(comparing.Snapshot):
    """What the callback must give back. Weights are trained, and Lightning sets attributes on its module."""

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        found = super().of(model)
        return found._replace(attributes=found.attributes[1:], tensors=dict.fromkeys(found.tensors, b""))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters and buffers of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Name the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the running statistics of a model, the number of batches tracked included."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def csv_metrics(logger: CSVLogger) -> dict[str, list[float]]:
    """Read back what a CSVLogger has written: key -> its values."""
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in (rows[0] if rows else [])}
