"""The scripts of the experiments with a network that takes no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from examples.experiment.networks import FEATURES, NETWORKS
from helpers.networks import randomized

TINY = ["--nets", "tiny", "--data", "elpv", "--seeds", "0", "--image-size", "16", "--epochs", "1"]


def build_tiny(image_size: int) -> nn.Module:
    """Return a backbone of one pair."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, FEATURES, 1)]
    return randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def type_command(monkeypatch: pytest.MonkeyPatch, script: ModuleType, out: Path, *args: str) -> dict[str, Any]:
    """Run a script of the experiments with the network `tiny`; return what it has written."""
    monkeypatch.setitem(NETWORKS, "tiny", build_tiny)
    assert script.__file__
    monkeypatch.setattr(sys, "argv", [script.__file__, *TINY, "--out", str(out), *args])
    script.main()
    report: dict[str, Any] = json.loads(out.read_text())
    name = Path(script.__file__).name
    assert report["command"] == " ".join([f"python examples/experiment/{name}", *sys.argv[1:]])
    return report
