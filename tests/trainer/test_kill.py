"""A run that is interrupted, terminated or killed: its checkpoints are plain, and it goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interrupted_runs import BATCHES, EPOCHS, KILLED_AT
from helpers.tiny_training import differing

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

HERE = Path(__file__).parents[1] / "helpers"
SIGNALS = ["SIGINT", "SIGTERM", "SIGKILL"]
PLACES = ["training", "validation"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start all runs at once, and send each but one its signal when it is where it should be."""
    root = tmp_path_factory.mktemp("runs")
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    folders = [root / f"{name}-{place}" for name in SIGNALS for place in PLACES]
    arguments = [root / "straight", *folders]
    for folder in arguments:
        folder.mkdir()
    with (root / "printed").open("w") as printed:
        command = [sys.executable, str(HERE / "interrupted_runs.py"), *map(str, arguments)]
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
    waiting, deadline = list(folders), time.monotonic() + 300
    while waiting:
        assert time.monotonic() < deadline, f"never got there: {waiting}"
        assert process.poll() is None, (root / "printed").read_text()
        time.sleep(0.05)
        for folder in [folder for folder in waiting if (folder / "there").exists()]:
            os.kill(int((folder / "there").read_text()), signal.Signals[folder.name.partition("-")[0]])
            (folder / "sent").touch()
            waiting.remove(folder)
    assert process.wait(timeout=300) == 0, (root / "printed").read_text()
    return root


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SIGNALS)
def test_a_run_goes_on_after_a_signal_as_if_nothing_had_been(runs: Path, name: str, place: str) -> None:
    """It ends early; every checkpoint is the uninterrupted run's, bit for bit, and so is the end after resuming."""
    folder, straight = runs / f"{name}-{place}", runs / "straight"
    ended = json.loads((folder / "ended.json").read_text())
    status = {"SIGINT": 1, "SIGTERM": 0, "SIGKILL": -signal.SIGKILL}[name]  # at a SIGTERM Lightning finishes the step
    assert ended["status"] == status, (runs / "printed").read_text()
    reached, steps = KILLED_AT if place == "training" else BATCHES, ended["steps"]
    assert steps == list(range(2, reached + 1, 2))
    for step in steps:
        of_both = (load(one / f"step={step}.ckpt")["state_dict"] for one in (folder, straight))
        assert differing(*of_both) == []
    resumed, uninterrupted = load(folder / "end.pt"), load(straight / "end.pt")
    assert uninterrupted["steps"] == EPOCHS * BATCHES
    assert resumed["steps"] == EPOCHS * BATCHES - steps[-1]
    assert differing(resumed["state_dict"], uninterrupted["state_dict"]) == []
