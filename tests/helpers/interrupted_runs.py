"""Runs to be interrupted, as a script: not a test by itself.

    python tests/helpers/interrupted_runs.py FOLDER/straight FOLDER/SIGINT-training FOLDER/SIGKILL-validation ...

Each folder gets a process of its own and in it a checkpoint after every second step. At its place, in training or in
validation, the process says so by a file ``there`` with its id, and waits for its signal, and goes on if it survives;
``straight`` has no such place. When all have ended, each interrupted run is resumed by another process. Of runs that
reach their end, ``end.pt`` holds the weights and the number of steps made; ``ended.json`` says how the first process
ended and after which steps it had saved.

All are forks of this one process, since the last bits of a sum depend on what a process has done before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from helpers.tiny_training import (
    TRUSTED,
    BoringModule,
    ResumableLoader,
    images_and_targets,
    make_trainer,
    quick,
    state_of,
)
from helpers.torch_settings import apply_torch_settings

EPOCHS = 3
BATCHES = 5
KILLED_AT = BATCHES + 3  # steps: in the second epoch, one step after a checkpoint


class Waiting(BoringModule):
    """Waits at the place that the name of its folder ends with, if it is given one."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.place = "" if folder is None else folder.name.partition("-")[2]

    def train_dataloader(self) -> Any:
        return ResumableLoader(images_and_targets(BATCHES).dataset, batch_size=2)

    def wait(self, place: str) -> None:
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
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    return make_trainer(quick(), saving, max_epochs=EPOCHS, enable_checkpointing=True)


def steps_in(folder: Path) -> list[int]:
    """Name the steps after which a run has saved."""
    return sorted(int(path.stem.partition("=")[2]) for path in folder.glob("step=*.ckpt"))


def run(folder: Path, module: Waiting, **how: Any) -> None:
    trainer(folder).fit(module, **how)
    torch.save({"state_dict": state_of(module), "steps": len(module.losses["fit"])}, folder / "end.pt")


def resume(folder: Path) -> None:
    run(folder, Waiting(), ckpt_path=folder / f"step={steps_in(folder)[-1]}.ckpt", **TRUSTED)


def statuses(work: Callable[[Path], None], folders: list[Path]) -> dict[Path, int]:
    """Work on each folder in a fork, so that Lightning is imported once; return how each ends."""
    processes = {}
    for folder in folders:
        pid = os.fork()
        if not pid:
            work(folder)
            sys.exit()
        processes[pid] = folder
    ended = (os.wait() for _ in folders)
    return {processes[pid]: os.waitstatus_to_exitcode(status) for pid, status in ended}


def main(folders: list[Path]) -> None:
    """Run all, and resume those that were interrupted."""
    apply_torch_settings()
    for folder, status in statuses(lambda folder: run(folder, Waiting(folder)), folders).items():
        (folder / "ended.json").write_text(json.dumps({"status": status, "steps": steps_in(folder)}))
    resumed = statuses(resume, [folder for folder in folders if folder.name != "straight"])
    sys.exit(max(map(abs, resumed.values())))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
