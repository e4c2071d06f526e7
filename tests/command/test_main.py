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
from helpers.command_line import SMALL, write_module

from lightning_convbn.command.main import build_parser, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: inspect|measure|export"),
        (["measure"], "required: MODEL"),
        (["measure", *SMALL, "--variants", "trian"], "invalid choice: 'trian'"),
        (["measure", *SMALL, "--batch-size", "0"], "invalid int, 1 or more, value: '0'"),
        (["measure", *SMALL, "--rounds", "-1"], "invalid int, 0 or more, value: '-1'"),
        (["measure", *SMALL, "--variants", "deploy"], "invalid choice: 'deploy'"),
        (["measure", *SMALL, "--modes", "tune"], "unrecognized arguments: --modes tune"),
        (["export", *SMALL], "required: PATH"),
        (["measure", *SMALL, "--input-shape", "8x3"], "--input-shape: not allowed with argument --size"),
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


def test_the_console_script_is_this_command() -> None:
    assert 'lightning-convbn = "lightning_convbn.command.main:main"' in (ROOT / "pyproject.toml").read_text()


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
