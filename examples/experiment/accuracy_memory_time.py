"""Fine-tune one network in the modes you choose, and compare their accuracy, memory and step time.

    python examples/experiment/accuracy_memory_time.py             # Tune mode, about two minutes on two CPU cores
    python examples/experiment/accuracy_memory_time.py --mode all  # Train, Eval and Tune side by side
    python examples/experiment/accuracy_memory_time.py --data imagefolder:PATH/TO/IMAGES

For the modes this file only adds `ConvBNModeCallback(mode)` to the callbacks of the Trainer. In the end it prints and
saves a table. The same fine-tuning as one file to copy is `examples/finetune.py`.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from examples.data.images_with_classes import ImageData
from examples.data.pretrained_weights import WeightsError
from examples.data.sources import BadImages, DataError
from examples.experiment.grid import above_zero
from examples.experiment.training import WARM_UP_STEPS, Recorder
from examples.results_file import write_json
from examples.templates.classification import Classifier
from examples.templates.networks.classifiers import build_classifier
from lightning_convbn import ConvBNModeCallback, measure_memory

Mode = Literal["train", "eval", "tune"]

BACKBONE = "torchvision:mobilenet_v2"
COMPARED_STEPS = 20


@dataclass
class Row:
    """A row of the closing table; None stands for what was not measured."""

    mode: str
    val_balanced_accuracy: float | None = None
    test_balanced_accuracy: float | None = None
    kept_for_backward_mib: float | None = None
    peak_memory_mib: float | None = None
    seconds_per_step: float | None = None


@dataclass
class Run:
    """The results of a training in one mode."""

    row: Row
    eval_kept_mib: float
    losses: list[float]
    plain_test_accuracy: float
    checkpoint: Path
    metrics: Path


def fine_tune(mode: Mode, args: argparse.Namespace) -> Run:
    """Train in one mode, test the best checkpoint, and measure."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # Lightning's own call
    seed_everything(args.seed, workers=True, verbose=False)
    data = read_data(args, bad_images="unchecked")  # `main` has read them all
    model = Classifier(len(data.classes), data.class_weights, BACKBONE, args.weights, args.lr)
    csv_logger = CSVLogger(args.out, name=mode)
    best = ModelCheckpoint(filename="best", monitor="val_acc", mode="max")
    recorder = Recorder()
    trainer = Trainer(
        callbacks=[ConvBNModeCallback(mode), best, recorder],
        logger=[csv_logger, TensorBoardLogger(args.out, name=mode, version=csv_logger.version)],
        devices=1,
        max_epochs=args.epochs,
        precision=args.precision,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    peak = peak_memory_mib()
    (scores,) = trainer.test(model, data, ckpt_path="best", verbose=False)

    # The checkpoint is that of a plain model, so it loads without the callback.
    plain_model = Classifier.load_from_checkpoint(best.best_model_path)
    plain_trainer = Trainer(logger=False, precision=args.precision, enable_progress_bar=False)
    (plain_scores,) = plain_trainer.test(plain_model, data, verbose=False)

    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    with trainer.precision_plugin.forward_context():
        kept, eval_kept = (measure_memory(model.backbone, images, mode=m).saved_mib for m in (mode, "eval"))
    return Run(
        Row(
            mode,
            float(best.best_model_score or 0.0),
            scores["test_acc"],
            kept,
            peak,
            median(recorder.seconds[WARM_UP_STEPS:] or recorder.seconds),
        ),
        eval_kept,
        recorder.losses,
        plain_scores["test_acc"],
        Path(best.best_model_path),
        Path(csv_logger.log_dir, "metrics.csv"),
    )


def fine_tune_in_own_process(mode: Mode, args: argparse.Namespace) -> Run:
    """Train in a new process, so that the peak memory belongs to this mode alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(fine_tune, mode, args).result()


def peak_memory_mib() -> float | None:
    """Return the peak memory of this process: GPU memory if there is a GPU, or else main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def read_data(args: argparse.Namespace, bad_images: BadImages = "error") -> ImageData:
    """Return the data that the command line names."""
    return ImageData(
        args.data,
        image_size=args.image_size,
        batch_size=args.batch_size,
        limit=args.limit,
        workers=args.workers,
        seed=args.seed,
        bad_images=bad_images,
    )


def report(runs: Sequence[Run], classes: Sequence[str], out: Path) -> None:
    """Print the closing table and the paths of all results; write the table as CSV and JSON."""
    rows = [run.row for run in runs]
    if all(row.mode != "eval" for row in rows):
        rows.insert(0, Row("eval", kept_for_backward_mib=runs[0].eval_kept_mib))
    chance = 1 / len(classes)
    rows.append(Row("majority class", chance, chance))
    print(f"\n{as_table(rows)}\n")
    print(f"Accuracy is balanced: the mean of the recalls of {', '.join(classes)}; the best epoch's.")
    print("Kept: what the backbone's forward keeps for backward, per step. Peak: of the whole process, in training.")
    if difference := compare_losses(runs):
        print(difference)
    print()
    for run in runs:
        print(f"{run.checkpoint}  (in a plain model, without callback: test accuracy {run.plain_test_accuracy:.3f})")
        print(run.metrics)
    print(write_csv(rows, out / "results.csv"))
    print(write_results(runs, rows, out / "results.json"))


def as_table(rows: Sequence[Row]) -> str:
    """Lay the rows out in columns."""
    lines = [("mode", "val. accuracy", "test accuracy", "kept MiB", "peak MiB", "s/step")]
    for mode, *numbers in map(astuple, rows):
        cells = ("-" if n is None else f"{n:.{digits}f}" for n, digits in zip(numbers, (3, 3, 1, 0, 3), strict=True))
        lines.append((mode, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([mode.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for mode, *cells in lines)


def write_csv(rows: Sequence[Row], path: Path) -> Path:
    """Write the rows, unrounded, and return the path."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(column.name for column in fields(Row))
        writer.writerows(map(astuple, rows))
    return path


def write_results(runs: Sequence[Run], rows: Sequence[Row], path: Path) -> Path:
    """Write the rows with the first losses, the command and the versions; return the path."""
    return write_json(
        path,
        [asdict(row) for row in rows],
        ("torch", "lightning"),
        device="cuda" if torch.cuda.is_available() else "cpu",
        plain_test_accuracy={run.row.mode: run.plain_test_accuracy for run in runs},
        first_losses={run.row.mode: run.losses[:COMPARED_STEPS] for run in runs},
    )


def compare_losses(runs: Sequence[Run]) -> str | None:
    """Return a sentence on how far the first training losses of Tune and Eval differ, if both ran."""
    losses = {run.row.mode: run.losses[:COMPARED_STEPS] for run in runs}
    if not {"eval", "tune"} <= losses.keys():
        return None
    pairs = list(zip(losses["eval"], losses["tune"], strict=True))
    difference = max(abs(b - a) / abs(a) for a, b in pairs)
    return f"The first {len(pairs)} training losses of tune and eval differ by at most {difference:.1e} of their value."


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune an ImageNet MobileNetV2, its BatchNorm layers in the mode you choose."
    )
    add = parser.add_argument
    modes, precisions = get_args(Mode), ("32-true", "bf16-mixed", "16-mixed")
    workers = max(0, min(8, (os.cpu_count() or 1) - 1))
    add("--mode", choices=[*modes, "all"], default="tune", help="what to train in; all: each in turn (%(default)s)")
    add(
        "--data",
        default="elpv",
        help="elpv (solar cells), imagefolder:PATH (a sub-folder to a class), csv:PATH ... (%(default)s)",
    )
    add("--epochs", type=above_zero, default=3, help="passes over the training images (%(default)s)")
    add("--batch-size", type=above_zero, default=32, help="images per training step (%(default)s)")
    add("--image-size", type=above_zero, default=128, help="edge of the square images in pixels (%(default)s)")
    add("--limit", type=above_zero, help="most training images (all)")
    add("--lr", type=float, default=0.01, help="peak learning rate of the head, ten times the backbone's (%(default)s)")
    add("--seed", type=int, default=0, help="decides the sets, the order of the images, the new head (%(default)s)")
    add("--workers", type=int, default=workers, help="processes that read images (%(default)s)")
    add("--precision", choices=precisions, default=precisions[0], help="what the Trainer computes in (%(default)s)")
    add("--weights", default="default", help="the ImageNet weights as a .pth file (downloaded)")
    add("--out", type=Path, default=Path("runs/modes"), help="folder for all that is saved (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train in the chosen modes, and report."""
    args = parse_args()
    try:  # find wrong arguments before the training starts
        data = read_data(args)
        build_classifier(BACKBONE, args.weights)
        args.out.mkdir(parents=True, exist_ok=True)
    except (DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --out {args.out}: {error}")
    print(f"{args.data}: {len(data.train)} training, {len(data.val)} validation and {len(data.test)} test images")
    modes: tuple[Mode, ...] = get_args(Mode) if args.mode == "all" else (args.mode,)
    run = fine_tune if len(modes) == 1 else fine_tune_in_own_process
    runs = [run(mode, args) for mode in modes]
    report(runs, data.classes, args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
