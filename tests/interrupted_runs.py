"""Runs to be interrupted, as a script: not a test by itself.

    python tests/interrupted_runs.py FOLDER/SIGINT-training FOLDER/SIGKILL-validation ...

Each folder gets a process of its own and in it a checkpoint after every second step. At its place, in training or in
validation, the process says so by a file ``there`` with its id, and waits for its signal, and goes on if it survives.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from boring import BoringModule, ResumableLoader, images_and_targets, make_trainer, quick
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

EPOCHS = 3
BATCHES = 5
KILLED_AT = BATCHES + 3  # steps: in the second epoch, one step after a checkpoint


class Waiting(BoringModule):
    """Waits at a place, if it is given a folder to say so in."""

    def __init__(self, place: str = "", folder: Path | None = None) -> None:
        super().__init__()
        self.place, self.folder = place, folder

    def train_dataloader(self) -> Any:
        """Give batches that a resumed run goes on with."""
        return ResumableLoader(images_and_targets(BATCHES).dataset, batch_size=2)

    def wait(self, place: str) -> None:
        """Wait to be interrupted."""
        if self.folder is not None and place == self.place:
            (self.folder / "writing").write_text(str(os.getpid()))
            (self.folder / "writing").rename(self.folder / "there")
            for _ in range(600):
                if (self.folder / "sent").exists():
                    return
                time.sleep(0.1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Wait in the middle of the second epoch."""
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == KILLED_AT:
            self.wait("training")
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Wait in the validation after the first epoch, which is one step after a checkpoint, too."""
        super().validation_step(batch, batch_idx)
        if self.current_epoch == 0:
            self.wait("validation")


def trainer(folder: Path) -> Any:
    """Make the Trainer; the same for every part of the run."""
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    return make_trainer(quick(), saving, max_epochs=EPOCHS, enable_checkpointing=True)


def main(folders: list[Path]) -> None:
    """Fork, so that Lightning is imported once, and write down how each process ends."""
    torch.set_num_threads(1)  # as the tests do: the last bits of a sum depend on it
    processes = {}
    for folder in folders:
        pid = os.fork()
        if not pid:
            trainer(folder).fit(Waiting(folder.name.rpartition("-")[2], folder))
            return
        processes[pid] = folder
    for _ in folders:
        pid, status = os.wait()
        (processes[pid] / "status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
