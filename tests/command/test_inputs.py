"""What a model is called with: `--input` in all its forms, and the example of a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import refusal, run_json, write_module
from helpers.comparing import assert_close
from helpers.networks import images
from helpers.other_inputs import (
    Captioned,
    OneDict,
    OneList,
    Scales,
    TwoImages,
    Unbatched,
    WithExample,
    write_checkpoint,
)
from lightning.pytorch import LightningModule

from lightning_convbn import measure_memory
from lightning_convbn.command.main import main
from lightning_convbn.memory import MIB

COUNT = ["--rounds", "0", "--variants", "tune"]
TWO = ["--input", "image=4x3x8x8", "--input", "depth=4x1x8x8"]


def count(capsys: pytest.CaptureFixture[str], module: LightningModule, *arguments: str) -> Any:
    """Measure a module from a checkpoint. Nothing is timed."""
    return run_json(capsys, "measure", *write_checkpoint(module), *COUNT, *arguments)


def assert_counted(found: Any, module: LightningModule, *args: Any, **kwargs: Any) -> None:
    """Check that the command has found what `measure_memory` finds for these arguments."""
    for mode in ("eval", "tune"):
        use = measure_memory(module.eval(), *args, mode=mode, **kwargs)  # type: ignore[arg-type]
        assert found["variants"][mode]["saved_bytes"] == use.saved_bytes > 0
        assert found["variants"][mode]["peak_bytes"] == use.peak_bytes


def tensor(*shape: int, dtype: str = "float32") -> dict[str, Any]:
    """What the JSON says of a tensor."""
    return {"shape": list(shape), "dtype": dtype}


class TestForms:
    @pytest.mark.parametrize(
        ("arguments", "args", "kwargs"),
        [
            (TWO, [], {"image": tensor(4, 3, 8, 8), "depth": tensor(4, 1, 8, 8)}),
            (["--input", "4x3x8x8", "--input", "4x1x8x8"], [tensor(4, 3, 8, 8), tensor(4, 1, 8, 8)], {}),
            (["--input", "depth=4x1x8x8", "--input", "4x3x8x8"], [tensor(4, 3, 8, 8)], {"depth": tensor(4, 1, 8, 8)}),
        ],
    )
    def test_several_tensors_by_name_and_by_position(
        self, arguments: list[str], args: Any, kwargs: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = count(capsys, TwoImages(), *arguments)
        assert found["inputs"] == {"args": args, "kwargs": kwargs, "source": None}
        assert found["batch"] == 4
        assert found["batchnorms"]["folded"] == 2
        assert_counted(found, TwoImages(), images(4, 3, 8, 8), images(4, 1, 8, 8))

    def test_dotted_names_are_one_dict(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = count(capsys, OneDict(), "--input", "batch.image=4x3x8x8", "--input", "batch.mask=4x1x8x8")
        assert found["inputs"]["kwargs"] == {"batch": {"image": tensor(4, 3, 8, 8), "mask": tensor(4, 1, 8, 8)}}
        assert_counted(found, OneDict(), {"image": images(4, 3, 8, 8), "mask": images(4, 1, 8, 8)})

    @pytest.mark.parametrize("name", ["", "images="])
    def test_a_list_has_an_entry_for_each_sample(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        found = count(capsys, OneList(), "--input", f"{name}[3x8x8,3x8x8]")
        given = [tensor(3, 8, 8)] * 2
        assert found["inputs"]["kwargs" if name else "args"] == ({"images": given} if name else [given])
        assert found["batch"] == 2
        assert_counted(found, OneList(), [*images(2, 3, 8, 8)])

    def test_each_entry_of_a_tuple_has_the_batch(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = count(capsys, Scales(), "--input", "(4x2x16x16, 4x3x8x8)")
        assert found["batch"] == 4
        assert_counted(found, Scales(), (images(4, 2, 16, 16), images(4, 3, 8, 8)))

    def test_a_shape_may_have_one_dimension(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = count(capsys, Unbatched(), "--input", "3")
        assert found["inputs"]["args"] == [tensor(3)]
        assert found["batchnorms"]["folded"] == 1
        assert_counted(found, Unbatched(), torch.randn(3))

    def test_what_is_no_float_is_zero(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module("captioned", "from helpers.other_inputs import Captioned\nnet = Captioned()")
        arguments = ["--input", "4x3x8x8", "--input", "mode=4x5:int64", "--dtype", "float64", "--rounds", "1"]
        found = run_json(capsys, "measure", "captioned:net", *arguments)
        assert found["inputs"]["args"] == [tensor(4, 3, 8, 8, dtype="float64")]
        assert found["inputs"]["kwargs"] == {"mode": tensor(4, 5, dtype="int64")}
        words = torch.zeros(4, 5, dtype=torch.int64)
        from captioned import net  # type: ignore[import-not-found]

        assert net.words
        assert all(torch.equal(seen, words) and seen.dtype == words.dtype for seen in net.words)

    def test_a_detector_takes_a_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module(
            "detectors",
            "from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn\n"
            "def small():\n"
            "    sizes = {'min_size': 64, 'max_size': 64}\n"
            "    return fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, **sizes)",
        )
        found = run_json(capsys, "measure", "detectors:small", *COUNT, "--input", "[3x64x64,3x48x64]")
        assert found["inputs"]["args"] == [[tensor(3, 64, 64), tensor(3, 48, 64)]]
        assert found["batchnorms"]["folded"] == found["batchnorms"]["total"] > 30
        assert found["variants"]["tune"]["peak_bytes"] < found["variants"]["eval"]["peak_bytes"]


class TestOutputs:
    def test_tensors_in_any_output_are_counted(self, capsys: pytest.CaptureFixture[str]) -> None:
        plain = run_json(capsys, "measure", "helpers.other_inputs:Wrapped", *COUNT, "--size", "8")["variants"]
        for kind in ("InDataclass", "InMapping"):
            wrapped = run_json(capsys, "measure", f"helpers.other_inputs:{kind}", *COUNT, "--size", "8")["variants"]
            assert [wrapped[mode]["saved_bytes"] for mode in wrapped] == [plain[mode]["saved_bytes"] for mode in plain]
            assert [wrapped[mode]["peak_bytes"] for mode in wrapped] == [plain[mode]["peak_bytes"] for mode in plain]


class TestLargestBatch:
    def test_all_inputs_get_the_batch(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = count(capsys, TwoImages(), *TWO, "--budget", "1MiB")["variants"]["tune"]
        fits, too_large = (
            measure_memory(TwoImages().eval(), images(batch, 3, 8, 8), images(batch, 1, 8, 8), mode="tune").peak_bytes
            for batch in (found["largest_batch"], found["largest_batch"] + 1)
        )
        assert fits is not None
        assert too_large is not None
        assert fits <= MIB - found["fixed_bytes"] < too_large

    def test_a_list_gets_more_entries(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = count(capsys, OneList(), "--input", "[3x8x8]", "--budget", "1MiB")["variants"]["tune"]
        fits, too_large = (
            measure_memory(OneList().eval(), [*images(batch, 3, 8, 8)], mode="tune").peak_bytes
            for batch in (found["largest_batch"], found["largest_batch"] + 1)
        )
        assert fits is not None
        assert too_large is not None
        assert fits <= MIB - found["fixed_bytes"] < too_large

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
            ((IMAGE, DEPTH), "2x3x8x8 2x1x8x8"),
            ([IMAGE, DEPTH.double()], "2x3x8x8 2x1x8x8"),
        ],
        ids=["dict", "tuple", "list"],
    )
    @pytest.mark.parametrize(
        "command", [["inspect"], ["measure", *COUNT, "--device", "cpu"]], ids=["inspect", "measure"]
    )
    def test_it_is_taken_and_said(
        self,
        command: list[str],
        example: Any,
        said: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(WithExample, "example", example)
        name, *options = command
        assert main([name, *write_checkpoint(WithExample()), *options]) == 0
        assert capsys.readouterr().out.startswith(f"last.ckpt: input {said} (example_input_array), float32, cpu\n")

    def test_one_tensor_is_the_only_argument(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module(
            "boring",
            "from helpers.tiny_training import BoringModule\nnet = BoringModule()\n"
            "net.example_input_array = torch.zeros(2, 3, 16, 16)",
        )
        found = run_json(capsys, "measure", "boring:net", *COUNT)
        assert found["inputs"] == {"args": [tensor(2, 3, 16, 16)], "kwargs": {}, "source": "example_input_array"}

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
        assert_counted(found, TwoImages(), images(5, 3, 8, 8), images(5, 1, 8, 8))
        assert count(capsys, WithExample(), *TWO)["inputs"]["source"] is None


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

    def test_the_page_says_the_inputs(self) -> None:
        assert main(["measure", *write_checkpoint(TwoImages()), *COUNT, *TWO, "--html", "page.html"]) == 0
        assert "input image=4x3x8x8 depth=4x1x8x8, float32, " in Path("page.html").read_text()


REFUSALS = {
    "no shape": (["image=8y3"], "--input 'image=8y3': '8y3' is no shape, as 8x3 or 8x3x224x224"),
    "no shape without a name": (["8,3"], "--input '8,3' is no shape, as 8x3 or 8x3x224x224"),
    "no shape in a list": (["[3x8x8,]"], "--input '[3x8x8,]': '' is no shape"),
    "unknown dtype": (["image=8x3:int65"], "there is no dtype 'int65'; give one of float32, "),
    "no name": (["8=3x8"], "--input '8=3x8': '8' is no name; give it as image=8x3 or batch.image=8x3"),
    "empty key": (["batch.=3x8"], "'batch.' is no name"),
    "name given twice": (["depth=8x3", "depth=8x4"], "--input 'depth=8x4': depth was given before"),
    "a whole and its entry": (["batch=8x3", "batch.image=8x4"], "batch was given as a whole before"),
    "an entry and its whole": (["batch.image=8x4", "batch=8x3"], "--input 'batch=8x3': batch was given before"),
    "unknown name": (
        ["image=8x3x8x8", "dept=8x1x8x8"],
        "the forward of TwoImages can't take the input image=8x3x8x8 dept=8x1x8x8: ",
    ),
    "names of the forward": (["image=8x3x8x8", "dept=8x1x8x8"], "its arguments are image, depth, scale; --input NAME="),
    "missing argument": (["image=8x3x8x8"], "missing a required argument: 'depth'; its arguments are image, depth"),
    "too many": (["8x3x8x8"] * 4, "too many positional arguments"),
    "given in both ways": (["8x3x8x8", "image=8x3x8x8"], "multiple values for argument 'image'"),
    "wrong sizes": (
        ["image=8x3x8x8", "depth=8x2x8x8"],
        "TwoImages can't take the input image=8x3x8x8 depth=8x2x8x8, float32: RuntimeError: ",
    ),
}


@pytest.mark.parametrize(
    "command", [["inspect"], ["measure"], ["export", "net.pt"]], ids=["inspect", "measure", "export"]
)
@pytest.mark.parametrize(("given", "message"), REFUSALS.values(), ids=REFUSALS)
def test_wrong_inputs_are_refused_in_one_line(
    command: list[str], given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *path = command
    inputs = [part for text in given for part in ("--input", text)]
    assert message in refusal(capsys, name, "helpers.other_inputs:TwoImages", *path, *inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TWO, "--size", "8"], "--input image=4x3x8x8 has the batch and all sizes: leave out --size 8"),
        ([*TWO, "--batch-size", "2"], "leave out --batch-size 2"),
        ([*TWO, "--input-shape", "8x3"], "leave out --input-shape 8x3"),
        (
            ["--input", "image=4x3x8x8", "--input", "depth=1x1x8x8", "--budget", "1GiB"],
            "--budget 1GiB needs inputs of one batch, which is the first size of a tensor and the number of entries of "
            "a list; they have image 4, depth 1: give all the same, or leave out --budget",
        ),
    ],
)
def test_measure_refuses_inputs_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "measure", "helpers.other_inputs:TwoImages", *arguments)


def test_an_example_without_a_batch_can_not_be_given_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WithExample, "example", (torch.zeros(2, 3, 8, 8), torch.zeros(1, 1, 8, 8), torch.tensor(1.0)))
    message = "--batch-size 4 needs inputs of one batch"
    assert message in refusal(capsys, "measure", "helpers.other_inputs:WithExample", "--batch-size", "4")


def test_export_refuses_what_a_file_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", "image=2x3x8x8", "--input", "mode=2x4:int64"]
    assert "the input mode: a file has positional arguments" in refusal(
        capsys, "export", "helpers.other_inputs:Captioned", "net.pt", *arguments
    )
