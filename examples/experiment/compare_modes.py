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
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from typing import Any, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, seed_everything

from examples.experiment.grid import (
    above_zero,
    add_grid_options,
    read_rows,
    run_grid,
    run_script,
    tell_what_is_wrong,
    to_run,
)
from examples.experiment.networks import NETWORKS
from examples.experiment.training import WARM_UP_STEPS, Classifier, Precision, Training, fit_and_test, load
from examples.results_file import BENCHMARKS, machine
from lightning_convbn import ConvBNModeCallback, find_conv_bn_pairs, fuse_for_deploy, measure_memory
from lightning_convbn.layers.state import Mode
from lightning_convbn.memory import MIB, count_saved_bytes

MODES: tuple[Mode, ...] = get_args(Mode)
LEARNING_RATES = (0.0001, 0.0003, 0.001, 0.003)


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


def run(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Train and test one cell; return its row."""
    torch.set_num_threads(1)
    sets = load(cell.data, cell.seed, **_images(settings))
    seed_everything(cell.seed, verbose=False)
    model = Classifier(NETWORKS[cell.net](settings.image_size), sets.class_weights, cell.lr)
    callbacks: list[Callback] = []
    if cell.mode == "deploy":
        model.backbone = fuse_for_deploy(model.backbone)
    else:
        callbacks.append(ConvBNModeCallback(cell.mode, verify=False, log_memory=False))
    training = Training(settings.epochs, settings.batch_size, cell.seed, precision=settings.precision)
    fitted = fit_and_test(model, sets, training, callbacks)
    losses, seconds = fitted.recorder.losses, fitted.recorder.seconds
    return {
        **cell._asdict(),
        "accuracy": fitted.scores["accuracy"],
        "diverged": fitted.diverged,
        "steps": len(losses),
        "first_loss": losses[0],
        "tenth_loss": losses[9] if len(losses) > 9 else None,
        "highest_loss": round(max(losses), 4),
        "last_epochs_loss": round(fmean(losses[-(len(sets.train) // settings.batch_size) :]), 4),
        "cpu_ms_per_step": round(1000 * median(seconds[WARM_UP_STEPS:] or seconds), 1),
    }


def _images(settings: Settings) -> dict[str, int]:
    """Return what decides the images, besides data set and seed."""
    return {name: getattr(settings, name) for name in ("image_size", "batch_size", "limit")}


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


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["net"], row["data"], row["lr"], row["seed"], MODES.index(row["mode"])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid_options(parser, limit=384, image_size=96, out=BENCHMARKS / "compare_modes.json")
    add = parser.add_argument
    add("--modes", nargs="+", choices=MODES, default=[*MODES], help="modes of the backbone (%(default)s)")
    add("--lrs", nargs="+", type=float, default=[*LEARNING_RATES], help="the backbone's learning rates (%(default)s)")
    add("--batch-size", type=above_zero, default=16, help="images per training step (%(default)s)")
    add("--precision", choices=get_args(Precision), default="32-true", help="what to compute in (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the cells that have no result yet, and write the results after each."""
    args = parse_args()
    torch.set_num_threads(1)
    settings = Settings(args.epochs, args.limit, args.batch_size, args.image_size, args.precision)
    rows = read_rows(args.out, asdict(settings))
    grid = [  # seeds first: an interrupted grid is a whole one with fewer seeds
        Cell(net, data, mode, seed, lr)
        for seed, lr, net, data, mode in itertools.product(args.seeds, args.lrs, args.nets, args.data, args.modes)
    ]
    cells = to_run(grid, rows, args.out)
    if not cells:
        return
    with tell_what_is_wrong(args.out):
        nets = {*args.nets, *(row["net"] for row in rows)}
        facts = {
            "machine": machine(torch.device("cpu")),
            "settings": asdict(settings),
            "kept_mib": {net: count_kept_mib(net, settings) for net in NETWORKS if net in nets},
            "scale_quartiles": {net: describe_scales(net, settings) for net in NETWORKS if net in nets},
        }
        for data in args.data:
            load(data, args.seeds[0], **_images(settings))
    run_grid(rows, cells, partial(run, settings=settings), jobs=args.jobs, out=args.out, place=_place, **facts)


if __name__ == "__main__":
    run_script(main)
