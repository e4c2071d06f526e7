"""Models that treat their inputs roughly, and inputs that can't be: they work, or are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import refusal, run_json, write_module

from lightning_convbn.command.main import main

NET = "nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))"

pytestmark = pytest.mark.usefixtures("own_folder")


def write_model(name: str, forward: str, rest: str = "") -> str:
    """Write a model with this forward into the current folder, and return the argument that names it."""
    lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        self.net = {NET}", *(f"        {line}" for line in rest.splitlines())]
    lines += [f"    {line}" for line in forward.splitlines()]
    write_module(name, "\n".join(lines))
    return f"{name}:Model"


@pytest.mark.parametrize("command", ["measure", "inspect"])
def test_a_forward_may_empty_the_dict_that_it_gets(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model("empties", "def forward(self, batch):\n    return self.net(batch.pop('image'))")
    rounds = ["--rounds", "2"] if command == "measure" else []
    found = run_json(capsys, command, model, "--input", "batch.image=2x3x8x8", *rounds)
    assert found["batchnorms"]["folded"] == 1


@pytest.mark.parametrize("command", ["measure", "inspect", "export"])
def test_a_forward_may_read_values_write_its_input_and_view_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples that share memory could be neither written nor viewed."""
    forward = "\n    ".join(
        (
            "def forward(self, images):",
            "if float(images.sum()) == 1.5: return images",
            "images.sub_(0.5)",
            "return self.net(images.view(-1, 3, 8, 8))",
        )
    )
    model = write_model(f"rough_{command}", forward)
    more = {"measure": ["--rounds", "0"], "inspect": [], "export": ["net.pt", "--static-batch"]}[command]
    assert main([command, model, *more, "--input", "2x3x8x8"]) == 0


@pytest.mark.parametrize("command", ["measure", "inspect"])
def test_an_input_that_can_not_be_made_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(f"plain_{command}", "def forward(self, images):\n    return self.net(images)")
    said = refusal(capsys, command, model, "--input", "8x3x99999999999x99999999999")
    assert "the input 8x3x99999999999x99999999999 can't be made" in said


@pytest.mark.parametrize("given", ["[3x8x8,3x8x8]", "2x3x8x8 --input 1x3x8x8"])
def test_a_file_with_any_batch_needs_tensors_of_one_batch(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    forward = "def forward(self, images, more=None):\n    return self.net(torch.stack(list(images)))"
    model = write_model("lists", forward)
    said = refusal(capsys, "export", model, "net.pt2", "--input", *given.split())
    assert "have no batch that is the first size of every tensor; add --static-batch" in said


class TestExamples:
    def test_the_dtype_is_that_of_the_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        rest = "self.example_input_array = torch.zeros(2, 3, 8, 8, dtype=torch.float64)\nself.double()"
        model = write_model("double", "def forward(self, images):\n    return self.net(images)", rest)
        found = run_json(capsys, "inspect", model)
        assert found["inputs"]["args"] == [{"shape": [2, 3, 8, 8], "dtype": "float64"}]

    def test_inspect_does_without_one_that_does_not_fit(self, capsys: pytest.CaptureFixture[str]) -> None:
        rest = "self.example_input_array = torch.zeros(2, 5, 8, 8)"
        model = write_model("stale", "def forward(self, images):\n    return self.net(images)", rest)
        assert main(["inspect", model]) == 0
        said = capsys.readouterr()
        assert "1 of 1 BatchNorm" in said.out
        assert "the model was looked at without it" in said.err

    def test_what_was_typed_is_not_ignored(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = write_model("typed", "def forward(self, images):\n    return self.net(images)")
        assert "can't take the input 2x5x8x8" in refusal(capsys, "inspect", model, "--input", "2x5x8x8")


def test_a_dataclass_may_hold_itself(capsys: pytest.CaptureFixture[str]) -> None:
    text = "from dataclasses import dataclass, field\nfrom typing import Any\n@dataclass\nclass Output:\n"
    text += "    features: Any\n    own: Any = None\n    unset: Any = field(init=False)\n"
    Path("outputs.py").write_text(text)
    forward = "\n    ".join(
        (
            "def forward(self, images):",
            "from outputs import Output",
            "output = Output(self.net(images))",
            "output.own = output",
            "return output",
        )
    )
    found: Any = run_json(capsys, "measure", write_model("holds", forward), "--rounds", "0", "--input", "2x3x8x8")
    assert found["variants"]["eval"]["saved_bytes"] > found["variants"]["tune"]["saved_bytes"]
