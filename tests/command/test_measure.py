"""`lightning-convbn measure`: what it counts, times, says and refuses."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import SMALL, refusal, run_json, write_module
from helpers.networks import images, small_net
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lightning_convbn import fuse_for_deploy, measure_memory
from lightning_convbn.command import measure
from lightning_convbn.command.counting_and_timing import ModelMeasurer
from lightning_convbn.command.main import main
from lightning_convbn.memory import MIB, count_saved_bytes

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
            assert found["variants"][mode]["saved_bytes"] == measure_memory(net, batch, mode=mode).saved_bytes
        assert found["variants"]["deploy-copy"]["saved_bytes"] == count_saved_bytes(fuse_for_deploy(net), batch)

    def test_blocks_add_up_and_pairs_are_one_block(self, found: Any) -> None:
        for mode, result in found["variants"].items():
            assert sum(block["saved_bytes"][mode] for block in found["blocks"]) == result["saved_bytes"]
        blocks = {block["name"]: block for block in found["blocks"]}
        assert list(blocks)[:2] == ["(input)", "0 + 1"]
        output = BATCH * 6 * 8 * 8 * 4
        # Eval keeps the convolution's output for BatchNorm; ReLU keeps its own, and not what it gets.
        vectors = 2 * 6 * 4  # two values for each of six channels
        assert blocks["0 + 1"]["saved_bytes"] == {"eval": output, "tune": vectors, "deploy-copy": 0}
        assert blocks["0 + 1"]["about"] == "Conv2d and BatchNorm2d, folded"
        assert "frozen: its input comes from" in blocks["3"]["about"]

    def test_steps_are_timed_in_every_round(self, found: Any) -> None:
        for result in found["variants"].values():
            assert len(result["step_seconds"]) == 3
            assert min(result["step_seconds"]) > 0
        assert found["variants"]["eval"]["step_time_ratio"] == [1, 1, 1]
        low, high = found["variants"]["tune"]["step_time_ratio"][1:]
        assert (
            low <= found["variants"]["tune"]["step_seconds"][0] / found["variants"]["eval"]["step_seconds"][0] <= high
        )

    def test_the_largest_batch_fits_and_the_next_one_does_not(self, found: Any) -> None:
        net = small_net().eval()
        for mode in ("eval", "tune"):
            result = found["variants"][mode]
            parameters = sum(parameter.nbytes for parameter in net.parameters())
            assert result["fixed_bytes"] == 2 * parameters + sum(buffer.nbytes for buffer in net.buffers())
            kept = [
                measure_memory(net, images(result["largest_batch"] + more, 3, 8, 8), mode=mode).saved_bytes
                for more in (0, 1)
            ]
            assert kept[0] <= MIB - result["fixed_bytes"] < kept[1]
        assert found["variants"]["tune"]["largest_batch"] > found["variants"]["eval"]["largest_batch"]

    def test_the_report_says_what_it_holds_and_what_not(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["measure", *SMALL, "--rounds", "1", "--budget", "1 mib", "--variants", "tune"]) == 0
        out = capsys.readouterr().out
        assert "largest batch in 1 mib" in out
        for said in (
            "not include the optimizer's state",
            "expect noise",
            "training it is unstable",
            "in 1 interleaved",
        ):
            assert said in re.sub(r"\s+", " ", out)
        assert re.search(r"^Tune +[\d.]+ MiB +-\d+\.\d % +[\d.]+ ms +[\d.]+ \(", out, re.MULTILINE)
        assert not re.search(r"^Deploy copy", out, re.MULTILINE)

    def test_without_rounds_and_peaks_nothing_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[type] = []

        class Seen(nn.Sequential):
            def forward(self, input: Tensor) -> Tensor:
                seen.append(type(input))
                return super().forward(input)  # type: ignore[no-any-return]

        monkeypatch.setattr(measure, "load_model", lambda *_: Seen(*small_net()))
        assert main(["measure", *SMALL, "--batch-size", "1000000", "--rounds", "0", "--budget", "1TiB"]) == 0
        assert len(seen) > 3
        assert [kind for kind in seen if issubclass(kind, FakeTensor)] == [
            kind for kind in seen if kind.__name__ != "Proxy"
        ]

    def test_a_model_that_looks_at_values_has_no_largest_batch(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert (
            main(["measure", "helpers.command_line:LooksAtValues", "--size", "8", "--rounds", "0", "--budget", "1GiB"])
            == 0
        )
        out = capsys.readouterr().out
        assert "Tune: no largest batch, because the model can't run on tensors without data" in " ".join(out.split())
        assert "1 of 1 BatchNorms folded" in out  # proven by running it

    def test_without_gradients_there_is_nothing_to_keep(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module("frozen", "from helpers.networks import small_net\nnet = small_net().requires_grad_(False)")
        assert main(["measure", "frozen:net", "--size", "8", "--rounds", "1", "--budget", "1GiB"]) == 0
        assert "no largest batch, because a larger batch keeps no more bytes" in capsys.readouterr().out

    @pytest.mark.parametrize(("shape", "folded"), [("8x3", 1), ("8x4x3", 0)])
    def test_an_input_may_have_any_shape(self, shape: str, folded: int, capsys: pytest.CaptureFixture[str]) -> None:
        write_module("rows", "net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))")
        found = run_json(capsys, "measure", "rows:net", "--input-shape", shape, "--rounds", "0")
        assert found["batchnorms"]["folded"] == folded

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_the_type_is_that_of_what_is_kept(self, dtype: str, found: Any, capsys: pytest.CaptureFixture[str]) -> None:
        other = run_json(capsys, "measure", *SMALL, "--batch-size", "4", "--rounds", "0", "--dtype", dtype)
        ratio = other["variants"]["deploy-copy"]["saved_bytes"] / found["variants"]["deploy-copy"]["saved_bytes"]
        assert ratio == {"float64": 2, "bfloat16": 0.5}[dtype]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1"], "can't take an input of 8 × 3 × 1 × 1, float32: RuntimeError: "),
        (
            ["--input-shape", "8x3", "--batch-size", "2"],
            "--input-shape 8x3 has the batch in it: leave out --batch-size",
        ),
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
    monkeypatch.setattr(ModelMeasurer, "measure", None)  # refused before the work
    assert message in refusal(capsys, "measure", "helpers.networks:small_net", *arguments)
    assert list(Path().iterdir()) == []
