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
from lightning_convbn.command.results import VARIANTS
from lightning_convbn.memory import MIB, count_saved_bytes

BATCH = 4
ASKED = {
    "train": {"mode": "train"},
    "train-elementwise": {"mode": "train", "recompute": "elementwise"},
    "train-blocks": {"mode": "train", "recompute": "blocks"},
    "eval": {"mode": "eval"},
    "tune": {"mode": "tune"},
    "tune-elementwise": {"mode": "tune", "recompute": "elementwise"},
    "tune-blocks": {"mode": "tune", "recompute": "blocks"},
}
TRAIN = [variant for variant in ASKED if variant.startswith("train")]


@pytest.fixture(scope="module")
def found() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out := io.StringIO())
        arguments = ["--batch-size", str(BATCH), "--rounds", "3", "--budget", "1MiB", "--json"]
        assert main(["measure", *SMALL, *arguments]) == 0
    return json.loads(out.getvalue())


class TestMeasure:
    def test_counts_are_those_of_measure_memory(self, found: Any) -> None:
        net, batch = small_net(), images(BATCH, 3, 8, 8)
        for variant, asked in ASKED.items():
            use = measure_memory(net.train(variant in TRAIN), batch, **asked)  # type: ignore[arg-type]
            assert found["variants"][variant]["saved_bytes"] == use.saved_bytes
            assert found["variants"][variant]["peak_bytes"] == use.peak_bytes
        assert found["variants"]["deploy-copy"]["saved_bytes"] == count_saved_bytes(fuse_for_deploy(net), batch)

    def test_blocks_add_up_and_pairs_are_one_block(self, found: Any) -> None:
        for mode, result in found["variants"].items():
            assert sum(block["saved_bytes"][mode] for block in found["blocks"]) == result["saved_bytes"]
        blocks = {block["name"]: block for block in found["blocks"]}
        assert list(blocks)[:2] == ["(input)", "0 + 1"]
        output = BATCH * 6 * 8 * 8 * 4
        # Eval keeps the convolution's output for BatchNorm; ReLU keeps its own, and not what it gets.
        vectors = 2 * 6 * 4  # two values for each of six channels
        statistics = output + vectors
        assert blocks["0 + 1"]["saved_bytes"] == {
            "train": statistics,
            "train-elementwise": statistics,
            "train-blocks": statistics,
            "eval": output,
            "tune": vectors,
            "tune-elementwise": vectors,
            "tune-blocks": vectors,
            "deploy-copy": 0,
        }
        assert blocks["0 + 1"]["about"] == "Conv2d and BatchNorm2d, folded"
        assert "frozen: its input comes from" in blocks["3"]["about"]

    def test_steps_are_timed_in_every_round(self, found: Any) -> None:
        for result in found["variants"].values():
            assert len(result["step_seconds"]) == 3
            assert min(result["step_seconds"]) > 0
        for variant, result in found["variants"].items():
            assert result["reference"] == ("train" if variant in TRAIN else "eval")
            reference = found["variants"][result["reference"]]
            ratio, low, high = result["step_time_ratio"]
            assert low <= result["step_seconds"][0] / reference["step_seconds"][0] <= high
            assert ratio == 1 or result is not reference

    def test_the_largest_batch_fits_and_the_next_one_does_not(self, found: Any) -> None:
        net = small_net()
        for variant, asked in ASKED.items():
            net.train(variant in TRAIN)
            result = found["variants"][variant]
            assert result["fixed_bytes"] == sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
            peaks = [
                measure_memory(net, images(result["largest_batch"] + more, 3, 8, 8), **asked).peak_bytes  # type: ignore[arg-type]
                for more in (0, 1)
            ]
            assert peaks[0] <= MIB - result["fixed_bytes"] < peaks[1]  # type: ignore[operator]
        for group in (TRAIN, [variant for variant in ASKED if variant not in TRAIN]):
            largest = [found["variants"][variant]["largest_batch"] for variant in group]
            assert largest == sorted(largest)
            assert largest[0] < largest[-1]

    def test_an_optimizer_takes_memory(self, found: Any, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--batch-size", str(BATCH), "--rounds", "0", "--budget", "1MiB", "--optimizer", "adamw"]
        with_state = run_json(capsys, "measure", *SMALL, *arguments)
        assert (found["optimizer"], with_state["optimizer"]) == ("none", "adamw")
        state = 2 * sum(parameter.nbytes for parameter in small_net().parameters())
        for variant, asked in ASKED.items():
            with_optimizer, without = with_state["variants"][variant], found["variants"][variant]
            assert with_optimizer["peak_bytes"] >= without["peak_bytes"] + state
            assert with_optimizer["largest_batch"] <= without["largest_batch"]
            net = small_net().train(variant in TRAIN)
            expected = measure_memory(net, images(BATCH, 3, 8, 8), optimizer="adamw", **asked)  # type: ignore[arg-type]
            assert with_optimizer["peak_bytes"] == expected.peak_bytes

    def test_frozen_parameters_get_no_gradient(self, found: Any, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--batch-size", str(BATCH), "--rounds", "0", "--freeze", "0", "1", "4"]
        frozen = run_json(capsys, "measure", *SMALL, *arguments)
        for variant, result in frozen["variants"].items():
            # Where Train recomputes, frozen layers keep nothing that the next output could be recomputed from.
            before = frozen["variants"]["train"] if variant in TRAIN[1:] else found["variants"][variant]
            assert result["saved_bytes"] < before["saved_bytes"]
            assert result["peak_bytes"] <= before["peak_bytes"]

    def test_the_table_has_what_was_asked_for_and_four_lines_below(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["measure", *SMALL, "--rounds", "1", "--budget", "1 mib"]) == 0
        _, table, prose = capsys.readouterr().out.split("\n\n")
        columns = re.split(" {2,}", table.splitlines()[0])
        kept = ["variant", "vs", "kept for backward", "change", "peak of a step", "change"]
        assert columns == [*kept, "step time", "ratio (rounds)", "largest batch"]
        number = r"[\d.]+"
        row = (
            rf"^Tune +Eval +{number} MiB +-{number} % +{number} MiB +[+-]{number} % +{number} ms +{number} \(.*\) +\d+$"
        )
        assert re.search(row, table, re.MULTILINE)
        assert len(prose.splitlines()) == 4
        for said in ("gradients, optimizer (none)", "training it is unstable", "median of 1", "expect noise"):
            assert said in prose
        assert main(["measure", *SMALL, "--rounds", "0", "--variants", "tune", "--optimizer", "sgd"]) == 0
        _, table, prose = capsys.readouterr().out.split("\n\n")
        assert re.split(" {2,}", table.splitlines()[0]) == kept
        assert [line.split()[0] for line in table.splitlines()] == ["variant", "Eval", "Tune"]
        assert "gradients, optimizer (sgd)" in prose
        assert prose.count("\n") == 1
        assert main(["measure", *SMALL, "--rounds", "0", "--variants", "train-elementwise"]) == 0
        _, table, prose = capsys.readouterr().out.split("\n\n")
        rows = [re.split(" {2,}", line)[:2] for line in table.splitlines()[1:]]
        assert [[cell.strip() for cell in row] for row in rows] == [["Train", "-"], ["Train + elementwise", "Train"]]
        assert "statistics of the batch" in prose

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
        out, err = capsys.readouterr()
        assert "Tune: no largest batch, because the model can't run on tensors without data" in err
        assert "1 of 1 BatchNorms folded" in out  # proven by running it

    def test_what_does_not_run_in_its_train_state_is_measured_in_the_others(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_module(
            "detectors",
            """class Detector(nn.Sequential):
    def forward(self, images, targets=None):
        if self.training and targets is None:
            raise ValueError("targets are missing")
        return super().forward(images)

net = Detector(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))""",
        )
        arguments = ["measure", "detectors:net", "--size", "8", "--rounds", "1", "--budget", "1MiB"]
        found = run_json(capsys, *arguments)
        assert list(found["variants"]) == [variant for variant in VARIANTS if variant not in TRAIN]
        why = "the model can't run in its train state: ValueError: targets are missing"
        assert found["notes"] == [f"Train: not measured, because {why}"]
        assert why in refusal(capsys, *arguments, "--variants", "train-blocks")

    def test_a_batch_of_one_can_not_be_trained(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module("pooled", "net = nn.Sequential(nn.Conv2d(3, 64, 8), nn.BatchNorm2d(64), nn.ReLU())")
        arguments = ["measure", "pooled:net", "--size", "8", "--rounds", "0", "--variants", "train"]
        plenty = run_json(capsys, *arguments, "--budget", "1MiB")["variants"]["train"]
        assert plenty["largest_batch"] > 8
        budget = f"{(plenty['fixed_bytes'] + 1000) / 1e6}MB"  # not even the gradients fit
        assert run_json(capsys, *arguments, "--budget", budget)["variants"]["train"]["largest_batch"] == 0

    def test_without_gradients_the_forward_pass_decides(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module("frozen", "from helpers.networks import small_net\nnet = small_net().requires_grad_(False)")
        found = run_json(capsys, "measure", "frozen:net", "--size", "8", "--rounds", "1", "--budget", "1MiB")
        for result in found["variants"].values():
            assert result["saved_bytes"] == 0
            assert result["peak_bytes"] > BATCH * 3 * 8 * 8 * 4
            assert 8 < result["largest_batch"] < 1000

    def test_the_type_is_that_of_what_is_kept(self, found: Any, capsys: pytest.CaptureFixture[str]) -> None:
        half = run_json(capsys, "measure", *SMALL, "--batch-size", "4", "--rounds", "0", "--dtype", "bfloat16")
        kept = half["variants"]["deploy-copy"]["saved_bytes"]
        assert kept == 0.5 * found["variants"]["deploy-copy"]["saved_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1"], "can't take the input 8x3x1x1, float32: RuntimeError: "),
        (["--budget", "8 apples"], "--budget '8 apples' is no amount of memory, as 8GiB"),
        (["--freeze", "layer9"], "--freeze layer9: nothing of that name wants a gradient; the model has 0, 1, 3, 4, 7"),
        (["--device", "cuda:99"], "--device 'cuda:99' can't be used"),
        (["--plot", "a.docx"], "--plot a.docx: the suffix must be one of "),
        (["--html", "no/a.html"], "--html no/a.html: there is no folder"),
    ],
)
def test_measure_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelMeasurer, "measure", None)  # refused before the work
    assert message in refusal(capsys, "measure", "helpers.networks:small_net", *arguments)
    assert list(Path().iterdir()) == []
