"""What a model is called with: shapes, a function of the user's, and the example of a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import refusal, run_json, write_module
from helpers.comparing import assert_close
from helpers.networks import images
from helpers.other_inputs import Captioned, OneDict, OneList, TwoImages, Unbatched, WithExample, write_checkpoint
from lightning.pytorch import LightningModule

from lightning_convbn import measure_memory
from lightning_convbn.command.main import main
from lightning_convbn.memory import MIB

COUNT = ["--rounds", "0", "--variants", "tune"]
TWO = ["--input", "image=4x3x8x8", "--input", "depth=4x1x8x8"]


def count(capsys: pytest.CaptureFixture[str], module: LightningModule, *arguments: str) -> Any:
    """Measure a module from a checkpoint. Nothing is timed."""
    return run_json(capsys, "measure", *write_checkpoint(module), *COUNT, *arguments)


def assert_counted(found: Any, module: LightningModule, *args: Any) -> None:
    """Check that the command has found what `measure_memory` finds for these arguments."""
    for mode in ("eval", "tune"):
        use = measure_memory(module.eval(), *args, mode=mode)  # type: ignore[arg-type]
        assert found["variants"][mode]["saved_bytes"] == use.saved_bytes > 0
        assert found["variants"][mode]["peak_bytes"] == use.peak_bytes


def tensor(*shape: int, dtype: str = "float32") -> dict[str, Any]:
    """What the JSON says of a tensor."""
    return {"shape": list(shape), "dtype": dtype}


class TestShapes:
    @pytest.mark.parametrize(
        ("arguments", "args", "kwargs"),
        [
            (["--input", "depth=4x1x8x8", "--input", "4x3x8x8"], [tensor(4, 3, 8, 8)], {"depth": tensor(4, 1, 8, 8)}),
            ([*TWO, "--batch-size", "6"], [], {"image": tensor(6, 3, 8, 8), "depth": tensor(6, 1, 8, 8)}),
        ],
        ids=["both", "with another batch"],
    )
    def test_several_tensors(
        self, arguments: list[str], args: Any, kwargs: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = count(capsys, TwoImages(), *arguments)
        assert found["inputs"] == {"args": args, "kwargs": kwargs, "source": None}
        assert found["batchnorms"]["folded"] == 2
        batch = found["batch"]
        assert_counted(found, TwoImages(), images(batch, 3, 8, 8), images(batch, 1, 8, 8))

    def test_what_is_no_float_is_zero_and_floats_have_the_dtype(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module("captioned", "from helpers.other_inputs import Captioned\nnet = Captioned()")
        arguments = ["--input", "4x3x8x8", "--input", "mode=4x5:int64", "--dtype", "float64", "--rounds", "1"]
        found = run_json(capsys, "measure", "captioned:net", *arguments)
        assert found["inputs"]["args"] == [tensor(4, 3, 8, 8, dtype="float64")]
        assert found["inputs"]["kwargs"] == {"mode": tensor(4, 5, dtype="int64")}
        words = torch.zeros(4, 5, dtype=torch.int64)
        from captioned import net  # type: ignore[import-not-found]

        assert net.words
        assert all(torch.equal(seen, words) and seen.dtype == words.dtype for seen in net.words)


class TestFunctions:
    def test_it_may_return_anything(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module(
            "batches",
            "def of_dict(): return ({'image': torch.ones(4, 3, 8, 8), 'mask': torch.ones(4, 1, 8, 8)},)\n"
            "def of_list(): return ([torch.ones(3, 8, 8), torch.ones(3, 8, 8)],)\n"
            "two = {'image': torch.ones(2, 3, 8, 8), 'depth': torch.ones(2, 1, 8, 8)}",
        )
        found = count(capsys, OneDict(), "--input", "batches:of_dict")
        assert found["inputs"]["args"] == [{"image": tensor(4, 3, 8, 8), "mask": tensor(4, 1, 8, 8)}]
        assert found["inputs"]["source"] == "batches:of_dict"
        assert_counted(found, OneDict(), {"image": images(4, 3, 8, 8), "mask": images(4, 1, 8, 8)})
        found = count(capsys, OneList(), "--input", "batches:of_list")
        assert found["inputs"]["args"] == [[tensor(3, 8, 8)] * 2]
        assert_counted(found, OneList(), [*images(2, 3, 8, 8)])
        assert count(capsys, TwoImages(), "--input", "batches:two")["batch"] == 2


class TestLargestBatch:
    def test_all_inputs_get_the_batch(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module("batches", "def of_list(): return ([torch.ones(3, 8, 8)],)")
        module = OneList()
        found = count(capsys, module, "--input", "batches:of_list", "--budget", "1MiB")["variants"]["tune"]

        def peak(batch: int) -> int:
            return measure_memory(module.eval(), [*images(batch, 3, 8, 8)], mode="tune").peak_bytes or 0  # type: ignore[arg-type]

        assert peak(found["largest_batch"]) <= MIB - found["fixed_bytes"] < peak(found["largest_batch"] + 1)

    def test_what_has_no_batch_is_noted_with_what_was_tried(self, capsys: pytest.CaptureFixture[str]) -> None:
        notes = count(capsys, Unbatched(), "--input", "3", "--budget", "1GiB")["notes"]
        assert len(notes) == 2
        for note in notes:
            assert "no largest batch, because the model can't run on tensors without data, on the input 1: " in note


class TestExample:
    IMAGE, DEPTH = torch.ones(2, 3, 8, 8), torch.ones(2, 1, 8, 8)

    @pytest.mark.parametrize(
        ("example", "said"),
        [
            ({"image": IMAGE, "depth": DEPTH}, "image=2x3x8x8 depth=2x1x8x8"),
            ([IMAGE, DEPTH.double()], "2x3x8x8 2x1x8x8"),
        ],
        ids=["dict", "list"],
    )
    def test_it_is_taken_and_said(
        self, example: Any, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(WithExample, "example", example)
        for command, *options in (["inspect"], ["measure", *COUNT, "--device", "cpu"]):
            assert main([command, *write_checkpoint(WithExample()), *options]) == 0
            assert capsys.readouterr().out.startswith(f"last.ckpt: input {said} (example_input_array), float32, cpu")

    def test_its_values_are_used(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module(
            "with_words",
            "from helpers.other_inputs import Captioned\nnet = Captioned()\n"
            "net.example_input_array = {'image': torch.zeros(2, 3, 8, 8), 'mode': torch.tensor([[7], [8]])}",
        )
        assert run_json(capsys, "inspect", "with_words:net")["inputs"]["kwargs"]["mode"] == tensor(2, 1, dtype="int64")
        from with_words import net  # type: ignore[import-not-found]

        assert {tuple(words.flatten().tolist()) for words in net.words} == {(7, 8)}

    def test_it_can_have_another_batch_and_an_option_wins(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = count(capsys, WithExample(), "--batch-size", "5")
        assert found["inputs"]["kwargs"] == {"image": tensor(5, 3, 8, 8), "depth": tensor(5, 1, 8, 8)}
        assert count(capsys, WithExample(), *TWO)["inputs"]["source"] is None

    def test_inspect_does_without_one_that_does_not_fit(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module(
            "stale",
            "net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
            "net.example_input_array = torch.zeros(2, 5, 8, 8)",
        )
        assert main(["inspect", "stale:net"]) == 0
        said = capsys.readouterr()
        assert "1 of 1 BatchNorm" in said.out
        assert "the model was looked at without it" in said.err
        assert "can't take the input 2x5x8x8" in refusal(capsys, "measure", "stale:net")


@pytest.mark.parametrize("command", ["measure", "inspect", "export"])
def test_a_forward_may_read_write_view_and_empty_its_input(command: str) -> None:
    write_module(
        "rough",
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "    def forward(self, batch):\n"
        "        images = batch.pop('image') if isinstance(batch, dict) else batch\n"
        "        if float(images.sum()) == 1.5: return images\n"
        "        images.sub_(0.5)\n"
        "        return self.net(images.view(-1, 3, 8, 8))\n"
        "def batch(): return ({'image': torch.ones(2, 3, 8, 8)},)",
    )
    more = {"measure": ["--rounds", "2"], "inspect": [], "export": ["net.pt", "--static-batch"]}[command]
    given = "2x3x8x8" if command == "export" else "rough:batch"
    assert main([command, "rough:Model", *more, "--input", given]) == 0


class TestOtherCommands:
    def test_inspect_proves_with_all_inputs(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = write_checkpoint(Captioned())
        assert "can't be traced" in run_json(capsys, "inspect", *model)["frozen"]["bn"]
        arguments = ["--input", "image=2x3x8x8", "--input", "mode=2x4:int64"]
        assert run_json(capsys, "inspect", *model, *arguments)["folded"] == [{"conv": "conv", "bn": "bn"}]

    def test_export_gives_the_file_all_inputs(self) -> None:
        torch.manual_seed(0)
        module = TwoImages().eval()
        assert main(["export", *write_checkpoint(module), "net.pt2", *TWO]) == 0
        batch = images(3, 3, 8, 8), images(3, 1, 8, 8)
        assert_close([torch.export.load("net.pt2").module()(*batch)["features"]], [module(*batch)["features"]], 1e-5)


REFUSALS = {
    "no shape": (["--input", "image=8y3"], "--input 'image=8y3' is no shape, as 8x3 or tokens=8x16:int64, and no pack"),
    "unknown dtype": (["--input", "image=8x3:int65"], "the dtype must be one of int64, "),
    "too large": (["--input", "8x3x99999999999x99999999999"], "x99999999999' can't be made: "),
    "function that fails": (["--input", "fails:batch"], "fails:batch could not be built: ValueError: no data"),
    "unknown name": (
        ["--input", "image=8x3x8x8", "--input", "dept=8x1x8x8"],
        "TwoImages can't take the input image=8x3x8x8 dept=8x1x8x8, float32: TypeError: ",
    ),
    "missing argument": (["--input", "image=8x3x8x8"], "missing 1 required positional argument: 'depth'"),
    "wrong sizes": (
        ["--input", "8x3x8x8", "--input", "8x2x8x8"],
        "can't take the input 8x3x8x8 8x2x8x8, float32: Runt",
    ),
}


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        *(("measure", *refused) for refused in REFUSALS.values()),
        *((command, *REFUSALS["missing argument"]) for command in ("inspect", "export")),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(
    command: str, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module("fails", "def batch(): raise ValueError('no data')")
    path = ["net.pt"] if command == "export" else []
    assert message in refusal(capsys, command, "helpers.other_inputs:TwoImages", *path, *given)
    assert not Path("net.pt").exists()


@pytest.mark.parametrize("option", [["--budget", "1GiB"], ["--batch-size", "4"]])
def test_inputs_of_several_batches_have_none(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--input", "image=4x3x8x8", "--input", "depth=1x1x8x8"]
    said = refusal(capsys, "measure", "helpers.other_inputs:TwoImages", *given, *option)
    assert "needs inputs of one batch, which is the first size of a tensor and the number of entries of a list" in said
    assert f"they are image=4x3x8x8 depth=1x1x8x8: give all the same batch, or leave out {option[0]}" in said


def test_export_refuses_what_a_file_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", "image=2x3x8x8", "--input", "mode=2x4:int64"]
    assert "the input mode: a file has positional arguments" in refusal(
        capsys, "export", "helpers.other_inputs:Captioned", "net.pt", *arguments
    )
    write_module("batches", "def of_list(): return ([torch.ones(3, 8, 8)],)")
    assert "have no batch that is the first size of every tensor; add --static-batch" in refusal(
        capsys, "export", "helpers.other_inputs:OneList", "net.pt2", "--input", "batches:of_list"
    )
