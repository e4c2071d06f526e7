"""The callback by ``--convbn``, by YAML and in a LightningCLI that knows nothing of it."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from boring import BATCHES_PER_EPOCH, LIGHTNING_SAYS, BoringModule, quick
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from PIL import Image

from lightning_convbn import ConvBNModeCallback
from lightning_convbn.cli import ConvBNCLI

pytestmark = LIGHTNING_SAYS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
]


class Module(BoringModule):
    """A `BoringModule` without arguments."""

    def __init__(self) -> None:
        super().__init__()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs write where the test does, and jsonargparse 4.49 and later keep what it thinks of Lightning's calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a CLI as if its arguments had been typed."""

    def run(*args: str, cli: type[LightningCLI] = ConvBNCLI, quiet: bool = True, **options: Any) -> Any:
        command, *rest = args or ("",)
        head = [command] if command and not command.startswith("-") else []
        monkeypatch.setattr(sys, "argv", ["train.py", *head, *(QUIET if quiet else ()), *args[len(head) :]])
        return cli(Module, seed_everything_default=0, save_config_callback=None, **{"run": bool(head), **options})

    return run


def callbacks_of(cli: Any) -> list[ConvBNModeCallback]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, ConvBNModeCallback)]


# ------------------------------------------------------------------------------------------------------ the flag


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_command_takes_the_flag(command: str, typed: Callable[..., Any]) -> None:
    modes = typed(command, "--convbn.mode=eval", "--convbn.eval_mode=tune", "--convbn.log_memory=false").model.modes
    expected = {command: ["tune"]}
    if command == "fit":
        expected = {"fit": ["eval"] * BATCHES_PER_EPOCH, "validate": ["tune"]}
    assert modes == expected


def test_tune_is_the_default(typed: Callable[..., Any]) -> None:
    (callback,) = callbacks_of(typed())
    assert vars(callback) == vars(ConvBNModeCallback())
    assert type(callback) is ConvBNModeCallback


def test_every_argument_of_the_callback_is_a_flag_with_its_help(
    typed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        typed("fit", "--convbn.help")
    printed = " ".join(capsys.readouterr().out.split())
    documented = re.split(r"\n {8}(?=\w+: )", str(ConvBNModeCallback.__doc__).partition("Args:")[2].partition("\n\n")[0])
    assert len(documented) - 1 == len(signature(ConvBNModeCallback).parameters)
    for line in documented[1:]:
        name, _, text = line.partition(": ")
        assert f"--convbn.{name} " in printed
        assert " ".join(text.split()) in printed


FLAGS = [
    (["--convbn=false"], None),
    (["--convbn=false", "--convbn=true"], {}),
    (["--convbn.mode=eval", "--convbn=true"], {}),
    (["--convbn.mode=eval", "--convbn=false"], None),
    (["--convbn=false", "--convbn.mode=eval"], {"mode": "eval"}),
    (["--convbn.target=backbone"], {"target": ["backbone"]}),
    (["--convbn.target=[backbone.stem,backbone.last]"], {"target": ["backbone.stem", "backbone.last"]}),
    (["--config=off.yaml"], None),
    (["--config=off.yaml", "--convbn=true"], {}),
    (["--config=off.yaml", "--convbn.start_epoch=2"], {"start_epoch": 2}),
    (["--config=on.yaml", "--convbn.start_epoch=2"], {"mode": "eval", "start_epoch": 2}),
    (["--config=on.yaml", "--convbn=false"], None),
    (["--config=on.yaml", "--config=off.yaml"], None),
    (["--config=off.yaml", "--config=on.yaml"], {"mode": "eval"}),
]


@pytest.mark.parametrize(("args", "expected"), FLAGS, ids=[" ".join(args) for args, _ in FLAGS])
def test_the_last_one_wins_and_the_printed_config_reads_back(
    args: list[str],
    expected: dict[str, Any] | None,
    typed: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("off.yaml").write_text("convbn: false\n")
    Path("on.yaml").write_text("convbn:\n  mode: eval\n")
    with pytest.raises(SystemExit, match="^0$"):
        typed(*args, "--print_config")
    Path("printed.yaml").write_text(capsys.readouterr().out)
    for cli in (typed(*args), typed("--config=printed.yaml", quiet=False)):
        found = callbacks_of(cli)
        assert len(found) == (expected is not None)
        for callback in found:
            assert vars(callback) == {**vars(ConvBNModeCallback()), **(expected or {})}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--convbn.mode=deploy", r"Expected a typing.Literal\['train', 'eval', 'tune'\]. Got value: deploy"),
        ("--convbn.moed=tune", "moed"),
        ("--convbn=maybe", "Given value: maybe"),
    ],
)
def test_a_wrong_flag_is_named(
    flag: str, message: str, typed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        typed("fit", flag)
    printed = capsys.readouterr().err
    assert '"convbn"' in printed
    assert re.search(message, printed)


def test_what_the_callback_refuses_is_refused(typed: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="start_epoch must be an epoch, 0 or later; got -1"):
        typed("--convbn.start_epoch=-1")


def test_missing_jsonargparse_is_told_with_our_extra(typed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.cli._JSONARGPARSE_SIGNATURES_AVAILABLE", "")
    with pytest.raises(ModuleNotFoundError, match=r"needs jsonargparse: pip install lightning-convbn\[cli\]"):
        typed()


@pytest.mark.parametrize("off", [False, True])
def test_saved_config_reads_back(off: bool, typed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["fit", *QUIET, "--convbn=false" if off else "--convbn.mode=eval", "--trainer.default_root_dir=saved"]
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--trainer.max_steps=0"])
    ConvBNCLI(Module)
    (callback,) = callbacks_of(typed("fit", "--config=saved/config.yaml", quiet=False)) or [None]
    assert (callback is None) == off
    assert off or callback.mode == "eval"


class OwnCLI(ConvBNCLI):
    """A project's CLI, which overrides what Lightning's documentation tells it to, without calling it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(convbn=False)


def test_a_cli_of_the_users_own_can_set_another_default(typed: Callable[..., Any]) -> None:
    assert callbacks_of(typed(cli=OwnCLI)) == []
    (callback,) = callbacks_of(typed("--convbn.mode=eval", cli=OwnCLI))
    assert callback.mode == "eval"


# --------------------------------------------------------------------------------- beside what comes another way


class ForcedCLI(ConvBNCLI):
    """A project's CLI that had the callback before there was a flag."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ConvBNModeCallback, "frozen")
        parser.set_defaults({"frozen.mode": "eval"})


EXPLICIT: list[tuple[list[str], dict[str, Any]]] = [
    (["--trainer.callbacks+=ConvBNModeCallback", "--trainer.callbacks.mode=eval"], {}),
    ([], {"trainer_defaults": {"callbacks": quick("eval")}}),
    ([], {"cli": ForcedCLI}),
]
WAYS = pytest.mark.parametrize(("args", "options"), EXPLICIT, ids=["trainer.callbacks", "trainer_defaults", "forced"])


@WAYS
@pytest.mark.parametrize("flag", [[], ["--convbn=true"], ["--convbn=false"]])
def test_an_explicit_callback_replaces_the_flags(
    args: list[str], options: dict[str, Any], flag: list[str], typed: Callable[..., Any]
) -> None:
    (callback,) = callbacks_of(typed(*args, *flag, **options))
    assert callback.mode == "eval"


@WAYS
def test_two_different_ones_are_an_error_that_names_both(
    args: list[str], options: dict[str, Any], typed: Callable[..., Any]
) -> None:
    message = "trainer.callbacks has a ConvBNModeCallback, and --convbn asks for another; .* give --convbn=false, or leave"
    with pytest.raises(ValueError, match=message):
        typed(*args, "--convbn.start_epoch=1", **options)


@pytest.mark.parametrize(("flag", "modes"), [("--convbn.mode=eval", ["eval"]), ("--convbn=false", ["train"])])
def test_the_flag_decides_against_the_variable(
    flag: str, modes: list[str], typed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, installed: Path
) -> None:
    monkeypatch.setenv("LIGHTNING_CONVBN", "tune")
    cli = typed("fit", flag)
    assert cli.model.modes["fit"] == modes * BATCHES_PER_EPOCH


def test_stock_cli_knows_the_short_name_of_what_is_imported(typed: Callable[..., Any]) -> None:
    args = ["--trainer.callbacks+=ConvBNModeCallback", "--trainer.callbacks.mode=eval"]
    cli = typed("fit", *args, "--trainer.callbacks.log_memory=false", cli=LightningCLI)
    assert cli.model.modes["fit"] == ["eval"] * BATCHES_PER_EPOCH
