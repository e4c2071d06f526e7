"""The command `lightning-convbn`: what it prints, counts, refuses and leaves behind."""

from __future__ import annotations

import io
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.comparing import assert_close
from helpers.networks import images, small_net
from helpers.tiny_training import BoringModule
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lightning_convbn import find_conv_bn_pairs, fuse_for_deploy, get_mode, measure_memory
from lightning_convbn.command import actions as commands
from lightning_convbn.command import measurement, terminal
from lightning_convbn.command.main import main
from lightning_convbn.command.measurement import Subject, largest_batch
from lightning_convbn.exporting.whole_file import written_whole
from lightning_convbn.memory import MIB, count_saved_bytes

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["helpers.networks:small_net", "--size", "8"]


@pytest.fixture(autouse=True)
def _own_folder_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the current directory


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


class TestInspect:
    def test_a_row_per_batchnorm_and_a_count(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "helpers.networks:small_net"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["state", "BatchNorm", "how", "or", "why"]
        assert "folded  1          into 0" in lines
        assert "frozen  3          its input comes from `2` (ReLU), not from a convolution" in lines
        assert lines[-1] == "3 of 4 BatchNorms folded, 1 frozen, 0 left alone"

    def test_json_says_what_find_conv_bn_pairs_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        found, pairs = run_json(capsys, "inspect", "helpers.networks:small_net"), find_conv_bn_pairs(small_net())
        assert found["folded"] == [pair._asdict() for pair in pairs]
        assert found["frozen"] == pairs.unpaired
        assert found["left"] == {}
        assert found["batchnorms"] == {"total": 4, "folded": 3, "frozen": 1, "left": 0}
        assert found["command"] == "lightning-convbn inspect helpers.networks:small_net --json"

    def test_what_has_no_statistics_is_left(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module(
            "stateless", "net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))"
        )
        assert list(run_json(capsys, "inspect", "stateless:net")["left"]) == ["1"]

    def test_an_input_proves_what_cannot_be_traced(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = f"{__name__}:LooksAtValues"
        assert "can't be traced" in run_json(capsys, "inspect", model)["frozen"]["bn"]
        assert run_json(capsys, "inspect", model, "--size", "8")["folded"] == [{"conv": "conv", "bn": "bn"}]

    @pytest.mark.parametrize(
        "model", ["torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "timm:mobilenetv3_small_050"]
    )
    def test_models_of_libraries_are_built_without_a_download(
        self, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("urllib.request.urlopen", None)
        monkeypatch.setattr("socket.socket.connect", None)
        assert main(["inspect", model]) == 0
        out = capsys.readouterr().out
        (folded, total) = map(int, re.search(r"(\d+) of (\d+) BatchNorms folded, 0 frozen", out).groups())  # type: ignore[union-attr]
        assert folded == total > 30
        assert ("FrozenBatchNorm2d where it loads pretrained" in out) == model.startswith("torchvision")

    def test_a_checkpoint_is_loaded_by_its_class(self, capsys: pytest.CaptureFixture[str]) -> None:
        module = BoringModule()
        checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.5.0", "epoch": 0}
        torch.save(checkpoint, "last.ckpt")
        found = run_json(capsys, "inspect", "last.ckpt", "--class", "helpers.tiny_training:BoringModule")
        assert [pair["bn"] for pair in found["folded"]] == [pair.bn for pair in find_conv_bn_pairs(module.eval())]

    def test_a_table_on_a_terminal_takes_names_literally(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setattr(sys, "stdout", screen := Terminal())
        terminal.print_table(("name", "bytes"), [("[red]a[/red]", "1"), ("b" * 200, "22")], numbers=["bytes"])
        assert "[red]a[/red]" in screen.getvalue()
        assert screen.getvalue().count("b") == 200 + len("bytes") - 4  # folded, not cut off


BATCH = 4


@pytest.fixture(scope="module")
def found() -> Any:
    """What the command has measured of a small net."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out := io.StringIO())
        arguments = ["--batch-size", str(BATCH), "--rounds", "3", "--budget", "1MiB", "--json"]
        assert main(["measure", *SMALL, *arguments]) == 0
    return json.loads(out.getvalue())


class TestMeasure:
    def test_counts_are_those_of_measure_memory(self, found: Any) -> None:
        net, batch = small_net().eval(), images(BATCH, 3, 8, 8)
        for mode in ("eval", "tune"):
            assert found["modes"][mode]["saved_bytes"] == measure_memory(net, batch, mode=mode).saved_bytes
        assert found["modes"]["deploy"]["saved_bytes"] == count_saved_bytes(fuse_for_deploy(net), batch)

    def test_blocks_add_up_and_pairs_are_one_block(self, found: Any) -> None:
        for mode, figures in found["modes"].items():
            assert sum(block["saved_bytes"][mode] for block in found["blocks"]) == figures["saved_bytes"]
        blocks = {block["name"]: block for block in found["blocks"]}
        assert list(blocks)[:2] == ["(input)", "0 + 1"]
        output = BATCH * 6 * 8 * 8 * 4
        scale = 6 * 4
        # Eval keeps the convolution's output for BatchNorm; ReLU keeps its own, and not what it gets.
        assert blocks["0 + 1"]["saved_bytes"] == {"eval": output, "tune": scale, "deploy": 0}
        assert blocks["0 + 1"]["about"] == "Conv2d and BatchNorm2d, folded"
        assert "frozen: its input comes from" in blocks["3"]["about"]

    def test_steps_are_timed_in_every_round(self, found: Any) -> None:
        for figures in found["modes"].values():
            assert len(figures["step_seconds"]) == 3
            assert min(figures["step_seconds"]) > 0
        assert found["modes"]["eval"]["step_time_ratio"] == [1, 1, 1]
        low, high = found["modes"]["tune"]["step_time_ratio"][1:]
        assert low <= found["modes"]["tune"]["step_seconds"][0] / found["modes"]["eval"]["step_seconds"][0] <= high

    def test_the_largest_batch_fits_and_the_next_one_does_not(self, found: Any) -> None:
        net = small_net().eval()
        for mode in ("eval", "tune"):
            figures = found["modes"][mode]
            parameters = sum(parameter.nbytes for parameter in net.parameters())
            assert figures["constant_bytes"] == 2 * parameters + sum(buffer.nbytes for buffer in net.buffers())
            kept = [
                measure_memory(net, images(figures["largest_batch"] + more, 3, 8, 8), mode=mode).saved_bytes
                for more in (0, 1)
            ]
            assert kept[0] <= MIB - figures["constant_bytes"] < kept[1]
        assert found["modes"]["tune"]["largest_batch"] > found["modes"]["eval"]["largest_batch"]

    def test_the_report_says_what_it_holds_and_what_not(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["measure", *SMALL, "--rounds", "1", "--budget", "1 mib", "--modes", "tune"]) == 0
        out = capsys.readouterr().out
        assert "largest batch in 1 mib" in out
        for said in ("Not in it: the optimizer's state", "noisy", "as training it is unstable", "of 1 interleaved"):
            assert said in re.sub(r"\s+", " ", out)
        assert re.search(r"^Tune +[\d.]+ MiB +-\d+\.\d % +[\d.]+ ms +[\d.]+ \(", out, re.MULTILINE)
        assert not re.search(r"^Deploy copy", out, re.MULTILINE)

    def test_without_rounds_and_peaks_nothing_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[type] = []
        net = small_net()
        net.register_forward_pre_hook(lambda module, inputs: seen.append(type(inputs[0])))
        monkeypatch.setattr(commands, "load_model", lambda *_: net)
        assert main(["measure", *SMALL, "--batch-size", "1000000", "--rounds", "0", "--budget", "1TiB"]) == 0
        assert len(seen) > 9
        assert [kind for kind in seen if issubclass(kind, FakeTensor)] == [
            kind for kind in seen if kind.__name__ != "Proxy"
        ]

    def test_a_model_that_looks_at_values_has_no_largest_batch(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["measure", f"{__name__}:LooksAtValues", "--size", "8", "--rounds", "0", "--budget", "1GiB"]) == 0
        out = capsys.readouterr().out
        assert "Tune: no largest batch, because the model can't be counted on tensors without data" in " ".join(
            out.split()
        )
        assert "1 of 1 BatchNorms folded" in out  # proven by running it

    def test_without_gradients_there_is_nothing_to_keep(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module("frozen", "from helpers.networks import small_net\nnet = small_net().requires_grad_(False)")
        assert main(["measure", "frozen:net", "--size", "8", "--rounds", "1", "--budget", "1GiB"]) == 0
        assert "no largest batch, because what is kept does not grow with it" in capsys.readouterr().out

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_the_type_is_that_of_what_is_kept(self, dtype: str, found: Any, capsys: pytest.CaptureFixture[str]) -> None:
        other = run_json(capsys, "measure", *SMALL, "--batch-size", "4", "--rounds", "0", "--dtype", dtype)
        ratio = other["modes"]["deploy"]["saved_bytes"] / found["modes"]["deploy"]["saved_bytes"]
        assert ratio == {"float64": 2, "bfloat16": 0.5}[dtype]


class TestSubject:
    def test_rounds_are_interleaved_and_the_first_one_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net, calls = small_net(), []

        def timed(model: nn.Module, batch: Tensor) -> float:
            calls.append(get_mode(model) if model is net else "deploy")
            return {"eval": 2.0, "tune": 3.0, "deploy": 1.0}[calls[-1]] * (100 if len(calls) <= 3 else 1)

        monkeypatch.setattr(measurement, "_step_seconds", timed)
        subject = Subject(net, (2, 3, 8, 8), torch.float32, torch.device("cpu"))
        stages: list[str] = []
        found = subject.measure(["tune", "deploy"], rounds=3, budget=None, progress=stages.append)
        assert calls == ["deploy", "tune", "eval", "eval", "tune", "deploy"] * 2
        assert found.figures["tune"].step_seconds == [3.0] * 3
        assert found.step_time_ratio("tune") == (1.5, 1.5, 1.5)
        assert len(stages) == measurement.count_stages(["tune", "deploy"], rounds=3, budget=None)
        assert get_mode(net) == "train"

    def test_running_out_of_memory_is_noted_and_the_others_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net = small_net()

        def timed(model: nn.Module, batch: Tensor) -> float:
            if model is net and get_mode(model) == "eval":
                raise torch.OutOfMemoryError("out of memory\nand a long story")
            return 1.0

        monkeypatch.setattr(measurement, "_step_seconds", timed)
        subject = Subject(net, (2, 3, 8, 8), torch.float32, torch.device("cpu"))
        found = subject.measure(["tune"], rounds=2, budget=None, progress=lambda stage: None)
        assert found.notes == ["Eval: not timed, out of memory"]
        assert found.figures["tune"].step_seconds == [1.0, 1.0]
        assert found.step_time_ratio("tune") is None

    def test_parts_divide_what_holds_most(self) -> None:
        heavy = nn.Sequential(small_net(), nn.Sequential(nn.Flatten(), nn.Linear(4, 4)))
        subject = Subject(heavy, (2, 3, 8, 8), torch.float32, torch.device("cpu"))
        found = subject.measure(["eval"], rounds=0, budget=None, progress=lambda stage: None)
        assert {block.part for block in found.blocks} >= {"(input)", "0.0", "0.4"}


@given(per_sample=st.integers(1, 50), constant=st.integers(0, 100), wobble=st.integers(0, 7), room=st.integers(0, 2000))
def test_largest_batch_is_the_largest(per_sample: int, constant: int, wobble: int, room: int) -> None:
    def kept(batch: int) -> int:  # not quite affine, as where an allocation is rounded up
        return constant + per_sample * batch + (batch // 3) * wobble

    expected = 0
    while kept(expected + 1) <= room:
        expected += 1
    assert largest_batch(kept, room) == expected


REFUSALS: dict[str, tuple[list[str], str]] = {
    "unknown torchvision model": (
        ["torchvision:resnet51"],
        "torchvision has no 'resnet51'; did you mean torchvision:resnet5",
    ),
    "unknown timm model": (["timm:efficientnet_bo"], "timm has no 'efficientnet_bo'; did you mean timm:efficientnet_b"),
    "no form of a model": (["resnet50"], "unknown model 'resnet50'; MODEL is torchvision:NAME, timm:NAME"),
    "unknown module": (["no_such.module:net"], "no module 'no_such', neither installed nor in "),
    "unknown attribute": (
        ["helpers.networks:smal_net"],
        "helpers.networks has no 'smal_net'; did you mean helpers.networks:small_net?",
    ),
    "module that needs another": (["needs:net"], "needs needs 'not_there'; pip install"),
    "module that raises": (["raises:net"], "raises can't be imported: ZeroDivisionError: division by zero"),
    "factory that raises": (["factories:broken"], "could not be built: ValueError: give me weights"),
    "factory that wants arguments": (["factories:greedy"], "missing 1 required positional argument: 'width'"),
    "factory of something else": (["factories:other"], "factories:other returns a int, not a torch.nn.Module"),
    "something else": (["factories:number"], "factories:number is a int, neither a model nor a callable"),
    "model without BatchNorm": (["torch.nn:Identity"], "Identity has no BatchNorm: there is nothing to fold or freeze"),
    "checkpoint without class": (["last.ckpt"], "add --class package.module:LightningModuleClass"),
    "missing checkpoint": (
        ["last.ckpt", "--class", "helpers.tiny_training:BoringModule"],
        "no checkpoint 'last.ckpt' in ",
    ),
    "class of no checkpoint": (
        ["helpers.networks:small_net", "--class", "helpers.tiny_training:BoringModule"],
        "--class is for a Lightning",
    ),
    "unwritable JSON": (
        ["helpers.networks:small_net", "--json", "no/such.json"],
        "--json no/such.json: there is no folder",
    ),
    "folder for a file": (["helpers.networks:small_net", "--json", "."], "--json . is a folder; name a file in it"),
    "bad size": (["helpers.networks:small_net", "--size", "8x"], "--size '8x' is neither a number of pixels"),
    "channels that don't fit": (
        ["helpers.networks:small_net", "--size", "1x8x8"],
        "Sequential can't take an input of 2 × 1 × 8 × 8",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_inspect_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("needs", "raises", "factories"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    write_module("needs", "import not_there")
    write_module("raises", "1 / 0")
    write_module(
        "factories",
        "def broken(): raise ValueError('give me weights\\nplease')\n"
        "def greedy(width): return nn.Linear(width, width)\n"
        "def other(): return 7\n"
        "number = 7",
    )
    assert message in refusal(capsys, "inspect", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1"], "can't take an input of 8 × 3 × 1 × 1, float32: RuntimeError: "),
        (["--budget", "8 apples"], "--budget '8 apples' is no amount of memory, as 8GiB"),
        (["--budget", "0GiB"], "--budget '0GiB' is no amount of memory"),
        (["--device", "cuda:99"], "--device 'cuda:99' can't be used"),
        (["--plot", "a.docx"], "--plot a.docx: the suffix must be one of "),
        (["--plot", "no/a.png"], "--plot no/a.png: there is no folder "),
        (["--html", "no/a.html"], "--html no/a.html: there is no folder"),
    ],
)
def test_measure_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subject, "measure", None)  # refused before the work
    assert message in refusal(capsys, "measure", "helpers.networks:small_net", *arguments)
    assert list(Path().iterdir()) == []


class TestExport:
    def test_the_file_computes_what_eval_computes(self, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save(small_net(seed=3).state_dict(), "trained.pt")
        write_module(
            "trained",
            "from helpers.networks import small_net\nnet = small_net()\nnet.load_state_dict(torch.load('trained.pt'))",
        )
        assert main(["export", "trained:net", "net.pt2", "--size", "8"]) == 0
        assert capsys.readouterr().out.startswith("wrote net.pt2: read back")
        batch = images(5, 3, 8, 8)
        expected = small_net(seed=3).eval()(batch)
        assert_close([torch.export.load("net.pt2").module()(batch)], [expected], 1e-5)

    def test_a_static_batch_is_fixed(self) -> None:
        assert main(["export", *SMALL, "net.pt2", "--static-batch", "--batch-size", "3"]) == 0
        with pytest.raises((AssertionError, RuntimeError)):
            torch.export.load("net.pt2").module()(images(5, 3, 8, 8))

    def test_random_weights_are_pointed_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["export", "torchvision:mobilenet_v3_small", "net.pt", "--size", "32"]) == 0
        assert "torchvision:mobilenet_v3_small has random weights" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("net.onx", "PATH='net.onx': the suffix must be one of "),
            ("no/net.pt", "PATH='no/net.pt': there is no folder "),
            (
                "net.onnx",
                "net.onnx': .onnx files need onnx and onnxscript and onnxruntime: pip install lightning-convbn[onnx]",
            ),
        ],
    )
    def test_a_path_that_can_not_be_written_is_refused_first(
        self, path: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_convbn.exporting.checked_file.find_spec", lambda name: None)
        monkeypatch.setattr(commands, "load_model", None)
        assert message in refusal(capsys, "export", "helpers.networks:small_net", path)

    def test_what_fails_leaves_no_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(commands, "export", failing := Mock(side_effect=RuntimeError("it deviates\nby much")))
        assert "it deviates\n" in refusal(capsys, "export", *SMALL, "net.pt")
        failing.assert_called_once()
        assert os.listdir() == []


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("timm", ["inspect", "timm:resnet18"], "timm:NAME needs timm, which can't be imported"),
        ("torchvision.models", ["inspect", "torchvision:resnet18"], "pip install torchvision"),
        (
            "matplotlib",
            ["measure", *SMALL, "--plot", "a.png"],
            "--plot needs matplotlib; pip install lightning-convbn[cli]",
        ),
    ],
)
def test_a_missing_library_is_named(
    missing: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("lightning_convbn.command.plot.find_spec", lambda name: None)
    assert message in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: inspect|measure|export"),
        (["measure"], "required: MODEL"),
        (["measure", *SMALL, "--modes", "trian"], "invalid choice: 'trian'"),
        (["measure", *SMALL, "--batch-size", "0"], "invalid int, 1 or more, value: '0'"),
        (["measure", *SMALL, "--rounds", "-1"], "invalid int, 0 or more, value: '-1'"),
        (["export", *SMALL], "required: PATH"),
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


class TestFiles:
    def test_all_files_are_written_and_only_they(self, capsys: pytest.CaptureFixture[str]) -> None:
        files = ["a.html", "a.json", "a.png"]
        options = [word for file in files for word in (f"--{file[2:].replace('png', 'plot')}", file)]
        assert main(["measure", *SMALL, "--rounds", "0", *options]) == 0
        assert sorted(os.listdir()) == files
        assert Path("a.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads(Path("a.json").read_text())["model"] == "helpers.networks:small_net"
        out, err = capsys.readouterr()
        assert "Deploy copy" in out
        assert err.splitlines() == ["wrote a.json", "wrote a.png", "wrote a.html"]

    def test_what_fails_half_way_leaves_the_old_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(path: Path, *_: object) -> None:
            path.write_text("half")
            raise OSError(28, "No space left on device")

        Path("a.png").write_text("old")
        monkeypatch.setattr(commands, "write_plot", fails)
        assert main(["measure", *SMALL, "--rounds", "0", "--plot", "a.png"]) == 1
        assert capsys.readouterr().err == "lightning-convbn: a.png was not written: No space left on device\n"
        assert os.listdir() == ["a.png"]
        assert Path("a.png").read_text() == "old"

    def test_a_written_file_has_the_rights_of_any_new_file(self) -> None:
        Path("plain").touch()
        with written_whole(Path("whole")) as path:
            path.write_text("whole")
        assert Path("whole").stat().st_mode == Path("plain").stat().st_mode


def test_a_person_types_it(tmp_path: Path) -> None:
    """A factory in the current directory, plain text into a pipe."""
    write_module("mine", "def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_convbn", "inspect"]
    typed = subprocess.run([*command, "mine:net"], env=environment, text=True, capture_output=True, timeout=100)
    table = "state   BatchNorm  how or why\nfolded  1          into 0\n"
    assert typed.stdout == f"{table}\n1 of 1 BatchNorms folded, 0 frozen, 0 left alone\n"
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


def test_the_console_script_is_this_command(project: dict[str, Any]) -> None:
    assert pkgutil.resolve_name(project["project"]["scripts"]["lightning-convbn"]) is main


def assert_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command on a model that there is not: nothing else may be wrong with it."""
    words = shlex.split(command, comments=True)
    words[1] = "nowhere.ckpt" if words[1].endswith(".ckpt") else "nowhere:net"
    assert main(words) == 1
    assert re.search("no (module|checkpoint) 'nowhere", capsys.readouterr().err)


class TestHelp:
    def test_examples_of_the_readme_parse_and_its_batches_are_those_of_the_page(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        readme = (ROOT / "README.md").read_text()
        examples = re.findall(r"^lightning-convbn (.*)$", readme, re.MULTILINE)
        assert len(examples) == 4
        for example in examples:
            assert_parses(example, capsys)
        batches = re.search(r"batch (\d+) in Eval mode, (\d+) in Tune mode", readme)
        assert batches is not None
        assert re.findall(r"^(?:Eval|Tune) .* (\d+)$", TestDocs.PAGE, re.MULTILINE) == list(batches.groups())

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
            assert_parses(example, capsys)


class TestDocs:
    PAGE = (ROOT / "docs" / "command.md").read_text()
    BLOCKS = re.findall(r"```console\n\$ lightning-convbn (.*)\n((?:.*\n)*?)```", PAGE)

    @pytest.mark.parametrize(("typed", "shown"), BLOCKS, ids=[typed for typed, _ in BLOCKS])
    def test_every_command_of_the_page_says_what_the_page_shows(
        self, typed: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(measurement, "_step_seconds", lambda model, batch: 1.0)  # times are nobody else's
        monkeypatch.delitem(sys.modules, "models", raising=False)
        (source,) = re.findall(r"```python\n(.*?)```", self.PAGE, re.DOTALL)
        Path("models.py").write_text(source)
        status = main(shlex.split(typed))
        out, err = capsys.readouterr()
        assert status == (1 if "lightning-convbn: " in shown else 0)
        assert self.without_times(out + err) == self.without_times(shown)

    def without_times(self, text: str) -> list[str]:
        text = re.sub(r"[\d.]+ ms +[\d.]+ \([\d.]+ to [\d.]+\)", "…", text)
        return [" ".join(line.split()) for line in text.splitlines()]

    def test_there_are_blocks(self) -> None:
        assert {typed.split()[0] for typed, _ in self.BLOCKS} == {"inspect", "measure", "export"}
