"""The command as a person types it: usage, exit status, help, pipes."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import SMALL, refusal, write_module

from lightning_convbn.command.main import build_parser, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: inspect|measure|export"),
        (["measure"], "required: MODEL"),
        (["measure", *SMALL, "--variants", "trian"], "invalid choice: 'trian'"),
        (["measure", *SMALL, "--batch-size", "0"], "argument --batch-size: '0' is no whole number of 1 or more"),
        (["measure", *SMALL, "--input", "8x3"], "argument --input: not allowed with argument --size"),
    ],
)
def test_wrong_usage_exits_by_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_interruption_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    write_module("interrupted", "def net(): raise KeyboardInterrupt")
    assert main(["inspect", "interrupted:net"]) == 130
    assert capsys.readouterr() == ("", "")


def test_the_traceback_of_a_users_failing_model_is_shown_if_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    write_module(
        "failing",
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.bn = nn.BatchNorm2d(3)\n"
        "    def forward(self, x):\n"
        "        return self.helper(self.bn(x))\n"
        "    def helper(self, x):\n"
        "        return x.no_such_attribute\n",
    )
    typed = ["inspect", "failing:Net", "--size", "8"]
    line = refusal(capsys, *typed)
    assert "AttributeError: 'Tensor' object has no attribute 'no_such_attribute' (--traceback shows where)" in line
    assert main([*typed, "--traceback"]) == 1
    shown = capsys.readouterr().err
    assert "in helper" in shown
    assert "return x.no_such_attribute" in shown
    assert shown.endswith(line)


def test_a_person_types_it(tmp_path: Path) -> None:
    """A factory in the current directory, plain text into a pipe."""
    write_module("mine", "def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_convbn", "inspect"]
    typed = subprocess.run([*command, "mine:net"], env=environment, text=True, capture_output=True, timeout=100)
    table = "state   BatchNorm  how or why\nfolded  1          into 0\n"
    assert typed.stdout == f"{table}\n1 of 1 BatchNorms folded, 0 frozen, 0 unfrozen\n"
    assert (typed.stderr, typed.returncode) == ("", 0)


def test_the_status_reaches_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-convbn", "inspect", "helpers.networks:no_net"])
    monkeypatch.delitem(sys.modules, "lightning_convbn.__main__", raising=False)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("lightning_convbn", run_name="__main__")
    assert exit.value.code == 1


def test_whoever_stops_reading_hears_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["inspect", "helpers.networks:small_net"]) == 1
    assert capfd.readouterr().err == ""


class TestHelp:
    def test_examples_of_the_readme_parse(self) -> None:
        readme = (ROOT / "README.md").read_text()
        examples = re.findall(r"^lightning-convbn (.*)$", readme, re.MULTILINE)
        assert [example.split()[0] for example in examples] == ["inspect", "measure"]
        for example in examples:
            assert build_parser().parse_args(shlex.split(example, comments=True)).model

    def commands_in(self, text: str) -> list[str]:
        return re.findall(r"^ +lightning-convbn (.*?)(?:  |$)", text, re.MULTILINE)

    @pytest.mark.parametrize("command", ["inspect", "measure", "export"])
    def test_examples_parse(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert "No weights are downloaded" in out
        examples = self.commands_in(out)
        assert len(examples) >= 2
        for example in examples:
            assert build_parser().parse_args(shlex.split(example)).model
