"""Running the command `lightning-convbn` in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_convbn.command.main import main

SMALL = ["helpers.networks:small_net", "--size", "8"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run the command with JSON on stdout, which must hold nothing else."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command for an exit status of 1 and one line on stderr."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("lightning-convbn: ")
    return err


def write_module(name: str, text: str) -> None:
    """Write a module into the current directory."""
    Path(f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{text}\n")


class LooksAtValues(nn.Module):
    """What can't be traced, nor run on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, input: Tensor) -> Tensor:
        return self.bn(self.conv(input)) if input.abs().sum() >= 0 else input
