"""Measure the time that the callback adds to a training step, against Tune mode set by hand.

    python examples/benchmarks/overhead.py

writes `docs/benchmarks/overhead.json` and `docs/benchmarks/overhead.md`. Two Trainers train equal networks in one
process, each in its own thread. They take turns after every step, so that other work slows down both alike.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from statistics import median, quantiles
from threading import Barrier, Semaphore, Thread
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model

from examples.results_file import BENCHMARKS, write_json
from lightning_convbn import ConvBNModeCallback, set_mode

WARM_UP = 5
# By default the C library gives each thread its own heap; then equal steps differ by up to 20 % between threads.
ONE_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}


class Classifier(LightningModule):
    """A torchvision classifier on random images."""

    def __init__(self, name: str, steps: int, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = get_model(name, num_classes=10)
        self.steps, self.size = steps, size

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Train."""
        return cross_entropy(self.backbone(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Give the same batch again and again."""
        images, labels = torch.randn(4, 3, self.size, self.size), torch.arange(4)
        data = TensorDataset(images.repeat(self.steps, 1, 1, 1), labels.repeat(self.steps))
        return DataLoader(data, batch_size=4)


class TakesTurns(Callback):
    """Waits after every step for a step of the other Trainer, and measures the time between two waits."""

    def __init__(self, mine: Semaphore, other: Semaphore) -> None:
        self.mine, self.other = mine, other
        self.seconds: list[float] = []
        self._since: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Hand over."""
        if self._since is not None:
            self.seconds.append(time.perf_counter() - self._since)
        self.other.release()
        self.mine.acquire()
        self._since = time.perf_counter()


def measure(name: str, steps: int, size: int) -> dict[str, Any]:
    """Train two networks in turn; return the median step times and their ratio."""
    by_hand, by_callback = (Classifier(name, steps, size) for _ in range(2))
    set_mode(by_hand.backbone, "tune")
    # Without the checks at the first batch: they enlarge the heap, which makes all later steps faster.
    by_itself = ConvBNModeCallback(freeze_untrained=True, verify=False, log_memory=False)
    semaphores = Semaphore(0), Semaphore(0)
    turns = [TakesTurns(*semaphores), TakesTurns(*reversed(semaphores))]
    ready = Barrier(2)

    def train(module: Classifier, callbacks: list[Callback]) -> None:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        ready.wait()
        trainer.fit(module)
        for semaphore in semaphores:
            semaphore.release()

    threads = [
        Thread(target=train, args=(by_hand, [turns[0]])),
        Thread(target=train, args=(by_callback, [turns[1], by_itself])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = [turn.seconds[WARM_UP:] for turn in turns]
    ratios = [after / before for before, after in zip(*seconds, strict=False)]
    lower, _, upper = quantiles(ratios, n=4)
    return {
        "model": name,
        "image": size,
        "steps": len(ratios),
        "by_hand_ms": round(1000 * median(seconds[0]), 3),
        "by_callback_ms": round(1000 * median(seconds[1]), 3),
        "ratio": round(median(seconds[1]) / median(seconds[0]), 4),
        "quartiles": [round(lower, 4), round(upper, 4)],
    }


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out as a page."""
    lines = [
        "# What the callback adds to a step",
        "",
        "For users who want to know what the callback costs in time. Two equal networks are trained on a CPU with",
        "4 images per step. One is set to Tune mode by hand (`set_mode`), the other by the callback, without its",
        "checks on the first batch. Their steps alternate, and the first ones do not count. The table shows medians,",
        "and the quartiles of the ratios of neighbouring steps.",
        "It is written by `python examples/benchmarks/overhead.py`.",
        "",
        "| model | image | steps | by hand, ms | by the callback, ms | ratio | quartiles |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row['model']} | {row['image']} | {row['steps']} | {row['by_hand_ms']:.1f} | {row['by_callback_ms']:.1f} "
        f"| {row['ratio']:.3f} | {row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"], help="torchvision classifiers")
    parser.add_argument("--steps", type=int, default=250, help="steps of each network")
    parser.add_argument("--size", type=int, default=64, help="pixels of the images' sides")
    arguments = parser.parse_args()
    if not ONE_HEAP.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_HEAP})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = [measure(name, arguments.steps, arguments.size) for name in arguments.models]
    write_json(
        BENCHMARKS / "overhead.json", rows, ("torch", "torchvision", "lightning"), threads=torch.get_num_threads()
    )
    (BENCHMARKS / "overhead.md").write_text(as_markdown(rows))
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
