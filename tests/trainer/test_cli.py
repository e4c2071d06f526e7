"""The callback by ``--convbn``, by YAML and in a LightningCLI that knows nothing of it."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from inspect import getdoc, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_training import BATCHES_PER_EPOCH, LIGHTNING_SAYS, BoringModule, quick
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from examples.templates.classification import Classifier, main
from lightning_convbn import ConvBNModeCallback, get_mode
from lightning_convbn.cli import ConvBNCLI

pytestmark = [*LIGHTNING_SAYS, pytest.mark.usefixtures("own_folder")]

ROOT = Path(__file__).resolve().parents[2]
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
    """A `BoringModule` without arguments, so that it has no flags; the last one made can be looked at."""

    last: Module

    def __init__(self) -> None:
        super().__init__()
        Module.last = self


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(*args: str, cli: type[LightningCLI] = ConvBNCLI, quiet: bool = True, **options: Any) -> Any:
        command, *rest = args or ("",)
        head = [command] if command and not command.startswith("-") else []
        monkeypatch.setattr(sys, "argv", ["train.py", *head, *(QUIET if quiet else ()), *args[len(head) :]])
        return cli(Module, seed_everything_default=0, save_config_callback=None, **{"run": bool(head), **options})

    return run


def callbacks_of(cli: Any) -> list[ConvBNModeCallback]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, ConvBNModeCallback)]


# ------------------------------------------------------------------------------------------------------ the flag


def settings(callback: ConvBNModeCallback) -> dict[str, Any]:
    """What a callback was told, without what it is about."""
    return {name: value for name, value in vars(callback).items() if not name.startswith("_")}


def test_every_argument_of_the_callback_is_a_flag_with_its_help(
    typed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        typed("fit", "--convbn.help")
    printed = " ".join(capsys.readouterr().out.split())
    documented = re.split(
        r"\n {4}(?=\w+: )", str(getdoc(ConvBNModeCallback)).partition("Args:")[2].partition("\n\n")[0]
    )
    assert len(documented) - 1 == len(signature(ConvBNModeCallback).parameters)
    for line in documented[1:]:
        name, _, text = line.partition(": ")
        assert f"--convbn.{name} " in printed
        assert " ".join(text.split()) in printed


CONFIGS: dict[str, Any] = {
    "tune": {},
    "eval": {"mode": "eval", "eval_mode": "eval"},
    "start_epoch": {"start_epoch": 1},
    "off": None,
    "stock_cli": {},
}
FLAGS = [
    (["--convbn=false"], None),
    (["--convbn=false", "--convbn=true"], {}),
    (["--convbn.mode=eval", "--convbn=false"], None),
    (["--convbn=false", "--convbn.mode=eval"], {"mode": "eval"}),
    (["--convbn.target=backbone"], {"target": ["backbone"]}),
    (["--convbn.target=[backbone.stem,backbone.last]"], {"target": ["backbone.stem", "backbone.last"]}),
    (["--config=recompute.yaml"], {"recompute": "elementwise"}),
    (["--config=recompute.yaml", "--convbn.recompute=none"], {}),
    (["--config=off.yaml"], None),
    (["--config=off.yaml", "--convbn.start_epoch=2"], {"start_epoch": 2}),
    (["--config=on.yaml", "--convbn.start_epoch=2"], {"mode": "eval", "start_epoch": 2}),
    (["--config=off.yaml", "--config=on.yaml"], {"mode": "eval"}),
    *(
        ([f"--config={ROOT / 'examples' / 'templates' / 'configs' / name}.yaml"], expected)
        for name, expected in CONFIGS.items()
    ),
]


@pytest.mark.parametrize(("args", "expected"), FLAGS, ids=[" ".join(args).replace(str(ROOT), "") for args, _ in FLAGS])
def test_the_last_one_wins_and_the_printed_config_reads_back(
    args: list[str],
    expected: dict[str, Any] | None,
    typed: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("off.yaml").write_text("convbn: false\n")
    Path("on.yaml").write_text("convbn:\n  mode: eval\n")
    Path("recompute.yaml").write_text("convbn: {recompute: elementwise}\n")
    with pytest.raises(SystemExit, match="^0$"):
        typed(*args, "--print_config")
    Path("printed.yaml").write_text(capsys.readouterr().out)
    for cli in (typed(*args), typed("--config=printed.yaml", quiet=False)):
        found = callbacks_of(cli)
        assert len(found) == (expected is not None)
        for callback in found:
            assert settings(callback) == {**settings(ConvBNModeCallback()), **(expected or {})}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--convbn.mode=deploy", r"Expected a typing.Literal\['train', 'eval', 'tune'\]. Got value: deploy"),
        ("--convbn.recompute=true", r"Expected a typing.Literal\['none', 'elementwise', 'blocks'\]. Got value: true"),
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


def test_missing_jsonargparse_is_told_with_its_installation(
    typed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.cli._JSONARGPARSE_SIGNATURES_AVAILABLE", "")
    with pytest.raises(
        ModuleNotFoundError, match=r"needs jsonargparse: pip install 'jsonargparse\[signatures\]>=4.43'"
    ):
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
@pytest.mark.parametrize("flag", [[], ["--convbn=false"]])
def test_an_explicit_callback_replaces_the_flags(
    args: list[str], options: dict[str, Any], flag: list[str], typed: Callable[..., Any]
) -> None:
    (callback,) = callbacks_of(typed(*args, *flag, **options))
    assert callback.mode == "eval"


@WAYS
def test_two_different_ones_are_an_error_that_names_both(
    args: list[str], options: dict[str, Any], typed: Callable[..., Any]
) -> None:
    message = (
        "trainer.callbacks has a ConvBNModeCallback, and --convbn asks for another; .* give --convbn=false, or leave"
    )
    with pytest.raises(ValueError, match=message):
        typed(*args, "--convbn.start_epoch=1", **options)


def test_stock_cli_knows_the_short_name_of_what_is_imported(typed: Callable[..., Any]) -> None:
    args = ["--trainer.callbacks+=ConvBNModeCallback", "--trainer.callbacks.mode=eval"]
    args += ["--trainer.callbacks.recompute=elementwise", "--trainer.callbacks.log_memory=false"]
    cli = typed("fit", *args, cli=LightningCLI)
    assert cli.model.modes["fit"] == ["eval"] * BATCHES_PER_EPOCH
    assert [callback.recompute for callback in callbacks_of(cli)] == ["elementwise"]


# ------------------------------------------------------------------------------------------------- docs, examples

PAGE = (ROOT / "docs" / "use" / "flags-yaml-environment.md").read_text()
DOCUMENTED = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
STOCK = "python stock.py fit --trainer.callbacks+=lightning_convbn.ConvBNModeCallback --trainer.callbacks.mode=tune"
DOES = {  # command -> what training and evaluation run in, or None where nothing runs
    "python train.py fit": ("tune", "deploy"),
    "python train.py fit --convbn.mode=eval --convbn.eval_mode=eval": ("eval", "eval"),
    "python train.py fit --convbn.target=backbone.stem --convbn.start_epoch=1": ("train, then tune", "deploy"),
    "python train.py fit --convbn=false": ("train", "train"),
    "python train.py test --convbn.eval_mode=tune": ("", "tune"),
    "python train.py fit --convbn.help": None,
    "python train.py fit --convbn.mode=eval --print_config > run.yaml": None,
    "python train.py fit --config run.yaml": ("eval", "deploy"),
    "python train.py fit --config run.yaml --convbn.eval_mode=eval": ("eval", "eval"),
    "python train.py fit --config run.yaml --convbn=false": ("train", "train"),
    "python examples/templates/classification.py fit --config examples/templates/configs/start_epoch.yaml": (
        "train, then tune",
        "deploy",
    ),
    STOCK: ("tune", "deploy"),
    "python stock.py fit --config examples/templates/configs/stock_cli.yaml": ("tune", "deploy"),
    "LIGHTNING_CONVBN=tune python script.py": ("tune", "deploy"),
    "LIGHTNING_CONVBN=eval python script.py": ("eval", "deploy"),
    "LIGHTNING_CONVBN=train,recompute=elementwise python script.py": ("train", "deploy"),
    "LIGHTNING_CONVBN=train,memory_budget=8GiB python script.py": ("train", "deploy"),
    "LIGHTNING_CONVBN=off python script.py": ("train", "train"),
}
SCRIPT = """
from lightning.pytorch import Trainer
from project import Classifier

Trainer(max_epochs=2).fit(Classifier())
"""


def test_every_documented_command_is_tested() -> None:
    assert list(DOES) == DOCUMENTED
    found = {name.stem for name in (ROOT / "examples" / "templates" / "configs").iterdir()}
    assert {name for name in found if not (ROOT / "examples" / "templates" / f"{name}.py").exists()} == {*CONFIGS}


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:GPU available but not used")
@pytest.mark.usefixtures("installed")
def test_documented_commands_do_what_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, one after the other; the imports of one each would take a minute and a half."""
    (script,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    Path("train.py").write_text(script)
    Path("stock.py").write_text(
        script.replace("lightning_convbn.cli", "lightning.pytorch.cli").replace("ConvBN", "Lightning")
    )
    Path("script.py").write_text(SCRIPT)
    Path("examples").symlink_to(ROOT / "examples")
    monkeypatch.setitem(sys.modules, "project", SimpleNamespace(Classifier=Module))
    done = {}
    for line in DOCUMENTED:
        if "examples/templates/classification.py" not in line:
            Module.last = Module()
            with monkeypatch.context() as context:
                type_here(line, context, capsys)
            modes = Module.last.modes
            trained = ", then ".join(dict.fromkeys(modes["fit"]))
            evaluated = {mode for stage in ("sanity", "validate", "test") for mode in modes[stage]}
            done[line] = (trained, *evaluated) if evaluated else None
    assert done == {line: does for line, does in DOES.items() if line in done}


def type_here(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, file = line.partition(" > ")
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert words[0] == "python"
    monkeypatch.setattr(sys, "argv", words[1:])
    capsys.readouterr()
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    if file:
        Path(file).write_text(capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_classification_template_trains_with_a_config_of_its_own(
    images: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: dict[bool, list[str]] = {True: [], False: []}

    def forward(module: Classifier, images: torch.Tensor) -> torch.Tensor:
        modes[module.training].append(get_mode(module))
        return plain_forward(module, images)

    plain_forward = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", forward)
    Path("examples").symlink_to(ROOT / "examples")
    tiny = f"--data.source=imagefolder:{images} --data.image_size=32 --data.batch_size=5 --model.weights={weights}"
    few = "--trainer.max_epochs=2 --trainer.limit_val_batches=1 --trainer.accelerator=cpu"
    file = "examples/templates/configs/tune.yaml"
    monkeypatch.setattr(sys, "argv", shlex.split(f"classification.py fit --config {file} {tiny} {few}"))
    main()
    trained, evaluated = (", then ".join(dict.fromkeys(modes[training])) for training in (True, False))
    assert (trained, evaluated) == ("tune", "deploy")
