"""A checkpoint may come from anybody: nothing that it carries is run, unless its user says that it is their own."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import refusal, run_json, write_module
from torch import nn

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
COMMANDS = {"inspect": [], "measure": ["--size", "8", "--rounds", "0"], "export": ["model.pt", "--size", "8"]}

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


class Command:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch written",)


def checkpoint(**more: Any) -> dict[str, Any]:
    """A checkpoint of the module that `arguments` names, with what else a test puts in."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    return {"state_dict": state, "pytorch-lightning_version": "2.5.5", "epoch": 0, **more}


def arguments(command: str, package: str) -> list[str]:
    """The command for ``last.ckpt``, with the class in a module of this package's own."""
    name = f"module_of_{package.replace('.', '_')}"
    write_module(
        name,
        f"from {package} import LightningModule\n"
        "class Net(LightningModule):\n"
        "    def __init__(self, width=4):\n"
        "        super().__init__()\n"
        "        self.net = nn.Sequential(nn.Conv2d(3, int(str(width)), 3), nn.BatchNorm2d(int(str(width))))\n"
        "    def forward(self, x):\n"
        "        return self.net(x)",
    )
    first, *rest = [command, "last.ckpt", *COMMANDS[command]]
    return [first, *rest, "--class", f"{name}:Net"]


@pytest.mark.parametrize(
    ("place", "command"), [("hyper_parameters", "inspect"), ("callbacks", "measure"), ("state_dict", "export")]
)
def test_a_checkpoint_that_carries_a_command_is_refused_and_the_command_is_not_run(
    place: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(checkpoint(**{place: {"width": Command()}}), "last.ckpt")
    message = refusal(capsys, *arguments(command, PACKAGES[0]))
    assert "last.ckpt holds a `posix.system`; only weights and plain values are loaded" in message
    assert "if the file is your own, add --trust-checkpoint" in message
    assert not Path("written").exists()
    assert not Path("model.pt").exists()


@pytest.mark.parametrize("save", [pickle.dumps, lambda value: pickle.dumps(value, 0)], ids=["pickle", "old pickle"])
def test_a_command_in_a_file_of_another_kind_is_not_run(save: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("last.ckpt").write_bytes(save(checkpoint(callbacks=Command())))
    refusal(capsys, *arguments("inspect", PACKAGES[0]))
    assert not Path("written").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_function_that_a_checkpoint_names_is_not_called(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_module("strange", "open('written', 'w').close()\ndef build(cls, config): return cls()")
    torch.save(checkpoint(hyper_parameters={"_instantiator": "strange.build"}), "last.ckpt")
    assert "a function that builds its model, `strange.build`" in refusal(capsys, *arguments("inspect", package))
    assert not Path("written").exists()


@pytest.mark.parametrize(
    ("command", "package"), [("inspect", PACKAGES[0]), ("measure", PACKAGES[1]), ("export", PACKAGES[0])]
)
def test_a_checkpoint_of_weights_and_plain_values_is_loaded(
    command: str, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_convbn.command.main import main

    torch.save(checkpoint(hyper_parameters={"width": 4}), "last.ckpt")
    assert main(arguments(command, package)) == 0, capsys.readouterr().err


def test_a_checkpoint_of_ones_own_may_hold_any_object(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(checkpoint(hyper_parameters={"width": Path("4")}), "last.ckpt")
    typed = arguments("inspect", PACKAGES[0])
    assert "holds a `pathlib." in refusal(capsys, *typed)
    assert run_json(capsys, *typed, "--trust-checkpoint")["folded"] == [{"conv": "net.0", "bn": "net.1"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "last.ckpt can't be read: EOFError"),
        (b"nonsense", "last.ckpt holds something that PyTorch does not know"),
        (pickle.dumps([1, 2], 2), "last.ckpt "),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("last.ckpt").write_bytes(content)
    assert message in refusal(capsys, *arguments("inspect", PACKAGES[0]))


def test_weights_that_are_no_checkpoint_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"0.weight": torch.ones(1)}, "last.ckpt")
    assert "last.ckpt is no Lightning checkpoint: it has no state_dict" in refusal(
        capsys, *arguments("inspect", PACKAGES[0])
    )


def test_trust_is_for_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "inspect", "helpers.networks:small_net", "--trust-checkpoint")
    assert "--trust-checkpoint is for a Lightning checkpoint (*.ckpt)" in message
