"""A run that is interrupted, terminated or killed: its checkpoints are plain, and it goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from boring import LIGHTNING_SAYS, TRUSTED, differing, state_of
from interrupted_runs import BATCHES, EPOCHS, KILLED_AT, Waiting, trainer

pytestmark = [
    *LIGHTNING_SAYS,
    pytest.mark.skipif(os.name == "nt", reason="signals of POSIX"),
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty"),
]

HERE = Path(__file__).parent
SIGNALS = ["SIGINT", "SIGTERM", "SIGKILL"]
PLACES = ["training", "validation"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start all runs at once, and send each its signal when it is where it should be."""
    root = tmp_path_factory.mktemp("killed")
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    folders = [root / f"{name}-{place}" for name in SIGNALS for place in PLACES]
    for folder in folders:
        folder.mkdir()
    with (root / "printed").open("w") as printed:
        command = [sys.executable, str(HERE / "interrupted_runs.py"), *map(str, folders)]
        runs = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
    waiting, deadline = list(folders), time.monotonic() + 300
    while waiting:
        assert time.monotonic() < deadline, f"never got there: {waiting}"
        assert runs.poll() is None, (root / "printed").read_text()
        time.sleep(0.05)
        for folder in [folder for folder in waiting if (folder / "there").exists()]:
            os.kill(int((folder / "there").read_text()), signal.Signals[folder.name.partition("-")[0]])
            (folder / "sent").touch()
            waiting.remove(folder)
    assert runs.wait(timeout=120) == 0
    return root


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts; its last weights are among its checkpoints."""
    folder = tmp_path_factory.mktemp("straight")
    module = Waiting()
    trainer(folder).fit(module)
    torch.save({"state_dict": state_of(module)}, folder / "end.pt")
    return folder


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint."""
    return torch.load(path, weights_only=False)["state_dict"]


def steps_in(folder: Path) -> list[int]:
    """Name the steps after which a run has saved."""
    return sorted(int(path.stem.partition("=")[2]) for path in folder.glob("step=*.ckpt"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SIGNALS)
def test_a_run_goes_on_after_a_signal_as_if_nothing_had_been(
    killed: Path, straight: Path, name: str, place: str
) -> None:
    """It ends early; every checkpoint is the uninterrupted run's, bit for bit, and so is the end after resuming."""
    folder = killed / f"{name}-{place}"
    status = int((folder / "status").read_text())  # at a SIGTERM Lightning finishes the step and ends in good order
    assert status == {"SIGINT": 1, "SIGTERM": 0, "SIGKILL": -signal.SIGKILL}[name], (killed / "printed").read_text()
    steps = steps_in(folder)
    reached = KILLED_AT if place == "training" else BATCHES
    assert steps == list(range(2, reached + 1, 2))
    for step in steps:
        of_both = (weights_in(one / f"step={step}.ckpt") for one in (folder, straight))
        assert differing(*of_both) == []
    resumed = Waiting()
    trainer(folder).fit(resumed, ckpt_path=folder / f"step={steps[-1]}.ckpt", **TRUSTED)
    assert len(resumed.losses["fit"]) == EPOCHS * BATCHES - steps[-1]
    assert differing(state_of(resumed), weights_in(straight / "end.pt")) == []
