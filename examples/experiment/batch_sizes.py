"""Why and when to freeze BatchNorm: Train mode and Tune mode at batch sizes from 2 to 32.

    python examples/experiment/batch_sizes.py --jobs 2  # the whole grid; finished cells are not run again
    python examples/experiment/batch_sizes_page.py      # its tables and its figure in the docs

Every cell of the grid fine-tunes one pretrained network on one data set with one seed and one batch size, with or
without gradient accumulation to 32 images per step. All cells see the same images equally often. The learning rates
grow in proportion to the images per step. The rest is as in `compare_modes.py`: SGD with momentum and a cosine decay,
no warm-up, no weight decay, no clipping, no dropout. A few cells run in Eval mode, which is Tune mode in numbers.

A Train cell is tested twice: with the running statistics that training has left, and with statistics that are measured
again on the training images. The second says whether training went wrong, or just the statistics did.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from examples.experiment.grid import add_grid_options, read_rows, run_grid, run_script, tell_what_is_wrong, to_run
from examples.experiment.networks import NETWORKS
from examples.experiment.training import (
    HEAD_LEARNING_RATE,
    WARM_UP_STEPS,
    Classifier,
    Sets,
    Training,
    fit_and_test,
    load,
    score,
)
from examples.results_file import BENCHMARKS, machine
from lightning_convbn import ConvBNModeCallback

Mode = Literal["train", "tune", "eval"]
MODES: tuple[Mode, ...] = get_args(Mode)
BATCH_SIZES = (2, 4, 8, 16, 32)
STEP = 32
"""Images per step of the optimizer where gradients are accumulated."""
RATES_ARE_FOR = 16
"""Images per step for which the learning rates are given: the batch size of `compare_modes.py`."""
MEASURED_IN = 64
"""Images per batch when the statistics are measured again."""


@dataclass(frozen=True)
class Settings:
    """The settings that all cells of a grid share."""

    epochs: int
    limit: int
    image_size: int
    lr: float
    head_lr: float = HEAD_LEARNING_RATE


class Cell(NamedTuple):
    """One run of the grid."""

    net: str
    data: str
    mode: Mode
    seed: int
    batch_size: int
    accumulate: int


class MeanOfImages(Classifier):
    """A classifier whose loss is a mean over images, so that accumulated batches add up to one large batch.

    `cross_entropy` with weights divides by the weights in the batch: they would cancel out where all of a small batch
    has one class.
    """

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss. Over the training images, each class has the same weight."""
        return cross_entropy(scores, labels, self.get_buffer("class_weights"), reduction="none").mean()


def run(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Train and test one cell; return its row."""
    torch.set_num_threads(1)
    sets = _images(cell.data, cell.seed, settings)
    seed_everything(cell.seed, verbose=False)
    scale = cell.batch_size * cell.accumulate / RATES_ARE_FOR
    backbone = NETWORKS[cell.net](settings.image_size)
    model = MeanOfImages(backbone, sets.class_weights, settings.lr * scale, settings.head_lr * scale)
    training = Training(settings.epochs, cell.batch_size, cell.seed, cell.accumulate)
    callback = ConvBNModeCallback(cell.mode, verify=False, log_memory=False)
    fitted = fit_and_test(model, sets, training, [callback])
    seconds = fitted.recorder.seconds
    losses = [loss * cell.accumulate for loss in fitted.recorder.losses]  # Lightning has divided them
    row = {
        **cell._asdict(),
        **fitted.scores,
        "diverged": fitted.diverged,
        "steps": fitted.trainer.global_step,
        "last_epochs_loss": round(fmean(losses[-(len(sets.train) // cell.batch_size) :]), 4),
        "cpu_ms_per_batch": round(1000 * median(seconds[WARM_UP_STEPS:] or seconds), 1),
    }
    if cell.mode == "train" and not fitted.diverged:
        update_bn(DataLoader(sets.train, MEASURED_IN), model.backbone)
        row["accuracy_measured_again"] = score(fitted.trainer, model, sets)["accuracy"]
    return row


def _images(data: str, seed: int, settings: Settings) -> Sets:
    """Return the same images for all batch sizes: as many as fill steps of `STEP` images."""
    return load(data, seed, image_size=settings.image_size, batch_size=STEP, limit=settings.limit)


def all_cells(args: argparse.Namespace) -> list[Cell]:
    """Return the grid, seeds first: an interrupted grid is a whole one with fewer seeds.

    Without ``--modes``, Eval runs with the first seed, at the smallest and the largest batch size.
    """
    batches = [
        (size, accumulate) for size in args.batch_sizes for accumulate in dict.fromkeys((1, max(1, STEP // size)))
    ]
    modes = args.modes or [mode for mode in MODES if mode != "eval"]
    cells = [
        Cell(net, data, mode, seed, *batch)
        for seed, data, net, batch, mode in itertools.product(args.seeds, args.data, args.nets, batches, modes)
    ]
    if args.modes:
        return cells
    ends = {(min(args.batch_sizes), 1), (max(args.batch_sizes), 1)}
    twins = [cell for cell in cells if cell.mode == "tune" and cell.seed == args.seeds[0] and cell[-2:] in ends]
    return [*cells, *(cell._replace(mode="eval") for cell in twins)]


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    batch = row["accumulate"] > 1, row["batch_size"]
    return row["net"], row["data"], *batch, row["seed"], MODES.index(row["mode"])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid_options(parser, limit=320, image_size=72, out=BENCHMARKS / "batch_sizes.json")
    add = parser.add_argument
    add("--modes", nargs="+", choices=MODES, help="modes of the backbone (train and tune, and a few cells in eval)")
    add("--batch-sizes", nargs="+", type=int, choices=BATCH_SIZES, default=[*BATCH_SIZES], help="(%(default)s)")
    add("--lr", type=float, default=0.0003, help=f"the backbone's rate for {RATES_ARE_FOR} per step (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the cells that have no result yet, and write the results after each."""
    args = parse_args()
    torch.set_num_threads(1)
    settings = Settings(args.epochs, args.limit, args.image_size, args.lr)
    rows = read_rows(args.out, asdict(settings))
    cells = to_run(all_cells(args), rows, args.out)
    if not cells:
        return
    with tell_what_is_wrong(args.out):
        facts = {"machine": machine(torch.device("cpu")), "settings": asdict(settings)}
        for net in args.nets:
            NETWORKS[net](settings.image_size)
        for data in args.data:
            _images(data, args.seeds[0], settings)
    run_grid(rows, cells, partial(run, settings=settings), jobs=args.jobs, out=args.out, place=_place, **facts)


if __name__ == "__main__":
    run_script(main)
