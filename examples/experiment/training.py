"""How a run of the experiments is trained and tested: images, loss, optimizer, Trainer."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from examples.data.images_with_classes import ImageData
from examples.experiment.networks import FEATURES

Precision = Literal["32-true", "64-true"]
DATA = ("elpv", "fashion-mnist")
HEAD_LEARNING_RATE = 0.01
TEST_IMAGES = 500  # at most
TEST_BATCH = 100
WARM_UP_STEPS = 3


class Sets(NamedTuple):
    """Decoded, resized and normalised images, and the weight of each class in the loss."""

    train: TensorDataset
    test: TensorDataset
    class_weights: list[float]


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Classifier(LightningModule):
    """A backbone with a new linear head.

    Args:
        backbone: From images to `FEATURES` features. The callback finds it by its name.
        class_weights: Weight of each class in the loss.
        lr: Learning rate of the backbone at the first step.
        head_lr: Learning rate of the head at the first step.
    """

    def __init__(
        self, backbone: nn.Module, class_weights: Sequence[float], lr: float, head_lr: float = HEAD_LEARNING_RATE
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(FEATURES, len(class_weights))
        self.register_buffer("class_weights", torch.tensor(class_weights))
        self.accuracy = MulticlassAccuracy(len(class_weights), average="macro")
        self.plain_accuracy = MulticlassAccuracy(len(class_weights), average="micro")
        self.lr, self.head_lr = lr, head_lr
        self.to(memory_format=torch.channels_last)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, in which each class has the same weight."""
        return cross_entropy(scores, labels, self.get_buffer("class_weights"))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, or stop the run if it is not finite."""
        images, labels = batch
        loss = self.loss(self.head(self.backbone(images)), labels)
        if not loss.isfinite():
            raise Diverged
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count right answers: class by class, and all together."""
        images, labels = batch
        scores = self.head(self.backbone(images))
        for name in ("accuracy", "plain_accuracy"):
            metric = getattr(self, name)
            metric(scores, labels)
            self.log(name, metric)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD with a cosine decay to zero."""
        groups: list[dict[str, Any]] = [
            {"params": self.backbone.parameters(), "lr": self.lr},
            {"params": self.head.parameters()},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.head_lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class Recorder(Callback):
    """Records the loss and the processor time of each training step. Other processes change that time least."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock after the batch is loaded."""
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        """Stop the clock after the optimizer's step."""
        self.losses.append(float(outputs["loss"]))
        self.seconds.append(time.process_time() - self._start)


@lru_cache(maxsize=2)
def load(data: str, seed: int, *, image_size: int, batch_size: int, limit: int) -> Sets:
    """Read a data set once per process and seed. All processes get the same images with the same flips.

    The batch size only says how many training images are left out: those that fill no batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = ImageData(
            data, image_size=image_size, batch_size=batch_size, limit=limit, eval_limit=TEST_IMAGES, seed=seed
        )
        train, test = (_collect(loader) for loader in (images.train_dataloader(), images.test_dataloader()))
        return Sets(train, test, images.class_weights)


def _collect(loader: DataLoader[tuple[Tensor, int]]) -> TensorDataset:
    images, labels = zip(*loader, strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


@dataclass(frozen=True)
class Training:
    """How a run is trained.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per forward pass.
        seed: Of the order of the images.
        accumulate: Batches per step of the optimizer.
        precision: What to compute in.
    """

    epochs: int
    batch_size: int
    seed: int
    accumulate: int = 1
    precision: Precision = "32-true"


class Fitted(NamedTuple):
    """A run that has ended.

    Attributes:
        trainer: It can test the model again.
        recorder: The losses and seconds of all batches.
        scores: What was tested, or chance if the run diverged.
        diverged: Whether the loss or a weight is no longer finite.
    """

    trainer: Trainer
    recorder: Recorder
    scores: dict[str, float]
    diverged: bool


def fit_and_test(model: Classifier, sets: Sets, training: Training, callbacks: Sequence[Callback]) -> Fitted:
    """Train a model and test it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        precision=training.precision,
        max_epochs=training.epochs,
        accumulate_grad_batches=training.accumulate,
        callbacks=[recorder, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    order = torch.Generator().manual_seed(training.seed)
    train = DataLoader(sets.train, training.batch_size, shuffle=True, drop_last=True, generator=order)
    try:
        with _expected_warnings():
            trainer.fit(model, train)
        diverged = not all(parameter.isfinite().all() for parameter in model.parameters())
    except Diverged:
        diverged = True
    chance = 1 / len(sets.class_weights)
    scores = {"accuracy": chance, "plain_accuracy": chance} if diverged else score(trainer, model, sets)
    return Fitted(trainer, recorder, scores, diverged)


def score(trainer: Trainer, model: Classifier, sets: Sets) -> dict[str, float]:
    """Return the balanced and the plain accuracy on the test images."""
    with _expected_warnings():
        (scores,) = trainer.test(model, DataLoader(sets.test, TEST_BATCH), verbose=False)
    return {name: round(float(value), 4) for name, value in scores.items()}


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Leave out what Lightning says about small data sets, Deploy copies and its own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*module.* in eval mode")  # a Deploy copy is so on purpose
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # Lightning's own call
        yield
