"""The benchmarks as a person runs them: complete; their pages agree with their files."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import images as random_images
from helpers.tiny_training import LIGHTNING_SAYS
from matplotlib.image import imread
from torch import nn

from examples import results_file
from examples.benchmarks import all_modes as script
from examples.benchmarks import gpu, gpu_page, modes_page, predicted_peaks, segmentation
from examples.benchmarks.allocator import allocations
from examples.benchmarks.networks import DETECTOR, MODELS, Workload
from examples.benchmarks.training_step import Step
from examples.benchmarks.variants import BUDGETS, VARIANTS, budget_name
from examples.data.digit_scenes import write_digit_masks

pytestmark = pytest.mark.slow  # a benchmark of the authors, which no user runs

WITHIN_BUDGETS = [*map(budget_name, BUDGETS)]
EAGER = [name for name, variant in VARIANTS.items() if not variant.compiled and name not in WITHIN_BUDGETS]
CPU = torch.device("cpu")


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


def resnet18(monkeypatch: pytest.MonkeyPatch, out: Path, *variants: str, sizes: tuple[str, ...] = ("2:32",)) -> None:
    run(
        monkeypatch,
        script,
        *("--models", "resnet18", "--sizes", *sizes, "--rounds", 2, "--out", out),
        *("--variants", *(variants or EAGER)),
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "tiny.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        resnet18(monkeypatch, path, sizes=("2:32", "3:32"))
    return path


@pytest.fixture
def rows(measured: Path) -> list[dict[str, Any]]:
    return copy.deepcopy(json.loads(measured.read_text())["rows"])


class TestRun:
    def test_every_variant_is_measured(self, rows: list[dict[str, Any]]) -> None:
        assert [row["batch"] for row in rows] == [2, 3]
        for row in rows:
            assert set(row["variants"]) == set(EAGER)
            assert row["batchnorms"]["folded"] == 20
            for name, found in row["variants"].items():
                assert "failed" not in found, (name, found)
                assert len(found["step_ms"]) == 2
                assert found["kept_bytes"] < found["peak_bytes"]

    def test_gradients_are_evals_but_for_train(self, rows: list[dict[str, Any]]) -> None:
        for name, found in rows[1]["variants"].items():
            off = found["gradient_deviation"]
            assert (off is None) if name == "train" else off < 1e-4, name

    @pytest.mark.slow
    def test_compiled_variants_are_measured(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        compiled = sorted(set(VARIANTS) - set(EAGER))
        resnet18(monkeypatch, tmp_path / "out.json", *compiled)
        (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
        for name in compiled:
            assert row["variants"][name]["gradient_deviation"] < 1e-4, row["variants"][name]
        assert row["variants"]["inductor_pass"]["note"] == "folded 20 of 20 blocks"


@pytest.fixture(scope="module")
def measured_quickly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "quick.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, gpu, "--device", "cpu", "--quick", "--output", path)
    return path


class TestGpuScript:
    """On a CPU, where it runs the same code; what it writes there never gets into the docs."""

    def test_every_cell_is_measured_in_every_mode(self, measured_quickly: Path) -> None:
        written = json.loads(measured_quickly.read_text())
        assert written["device"] == "cpu"
        assert written["quick"] is True
        assert {"python", "torch", "torchvision"} <= set(written["versions"])
        assert [row["model"] for row in written["rows"]] == list(gpu.QUICK_NETWORKS)
        assert all(row["equal"] for row in written["parity"])
        for row in written["rows"]:
            assert set(row["variants"]) == set(gpu.MODES)
            for found in row["variants"].values():
                assert found["kept_bytes"] < found["peak_bytes"]
                assert len(found["step_ms"]) == gpu.QUICK_ROUNDS

    def test_a_cpu_never_writes_the_file_of_the_docs(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(gpu, "compare", None)
        with pytest.raises(SystemExit):
            run(monkeypatch, gpu, "--device", "cpu", "--output", gpu.RESULTS)
        assert "--output: gpu.json of the docs is for a whole run on a GPU" in capsys.readouterr().err

    def test_the_page_comes_from_the_committed_measurements(self) -> None:
        page = gpu_page.PAGE.read_text()
        found, peers = (json.loads(path.read_text()) for path in (gpu_page.RESULTS, gpu_page.PEERS))
        assert results_file.filled(page, gpu_page.tables(found, peers)) == page
        assert found["device"] == "cuda"
        assert not found["quick"]


class TestMeasuring:
    def test_a_compilers_memory_budget_is_in_force_behind_the_same_network_without_one(self) -> None:
        """Dynamo would run the code of the first one again, if both were compiled in the same way."""
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU())]
        work = Workload(nn.Sequential(*layers), (random_images(2, 8, 16, 16),))
        kept = []
        for name in ("compiled", "compiled_half", "compiled_0"):
            step = Step(work, VARIANTS[name].build(work), CPU, "fp32")
            step()
            kept.append(step.memory()["kept_bytes"])
        assert kept[0] > kept[1] > kept[2], kept

    def test_allocations_are_told_in_order(self) -> None:
        deltas = allocations(lambda: torch.ones(1000).add(1))
        assert [delta for delta in deltas if abs(delta) >= 4000] == [4000, 4000, -4000, -4000]


class TestPageOfTheModes:
    def test_it_comes_from_the_committed_measurements(self) -> None:
        found, page = json.loads(modes_page.RESULTS.read_text()), modes_page.PAGE.read_text()
        assert results_file.filled(page, modes_page.tables(found)) == page
        assert f"]({modes_page.PICTURE.name})" in page

    def test_it_tells_of_failures(self, measured: Path) -> None:
        found = json.loads(measured.read_text())
        found["rows"][0]["variants"]["mmengine"] = {"failed": "KeyError: 'input'"}
        tables = modes_page.tables(found)
        assert tables["notes"] == ["- resnet18, batch 2, 32 px, cpu: mmengine failed: KeyError: 'input'"]
        assert [row.endswith(" failed |") for row in tables["modes"][2:]] == [False, True], "the larger batch is first"

    def test_it_names_what_is_better_in_both_peak_and_step(self, rows: list[dict[str, Any]]) -> None:
        row = {**rows[1], "variants": {name: dict(rows[1]["variants"][name]) for name in ("eval", "tune", "mmengine")}}
        for name, peak, step in (("eval", 9, 9.0), ("tune", 8, 8.0), ("mmengine", 7, 7.0)):
            row["variants"][name] |= {"peak_bytes": peak, "step_ms": [step, step]}
        machine = {"cpu": "a CPU", "threads": 1}
        lost = modes_page.tables({"rows": [row], "machine": machine, "versions": {}})["losses"]
        assert lost == [
            "- **Tune has a longer step than mmengine**: resnet18 at batch 3 (1.14).",
            "- **Tune is beaten in both peak and step**: resnet18 at batch 3 (mmengine).",
        ]

    def test_the_picture_can_be_seen_on_any_page(self, rows: list[dict[str, Any]], tmp_path: Path) -> None:
        pixels = imread(modes_page.draw(rows, tmp_path / "drawn.png"))
        assert pixels[..., 3].min() == 1, "opaque"
        assert pixels.std() > 0.01, "not empty"


@pytest.mark.usefixtures("own_folder")
class TestComparisonsOfTemplates:
    pytestmark = [*LIGHTNING_SAYS, pytest.mark.slow]

    @pytest.mark.filterwarnings("ignore:ConvBN. 7 BatchNorm.s. of `network` stay in Train mode")
    @pytest.mark.filterwarnings("ignore:The number of training batches")
    def test_segmentation_tries_each_way(self, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_digit_masks(Path("digits"), {"train": 8, "val": 2, "test": 2}, size=32, seed=0)
        tiny = ["--folder=digits", f"--weights={weights}", "--image-size=32", "--epochs=2", "--out=out"]
        run(monkeypatch, segmentation, *tiny)
        rows = json.loads(Path("out/results.json").read_text())["rows"]
        assert [row["way"] for row in rows] == list(segmentation.ways(2))
        assert {path.stem for path in Path("out").glob("*.png")} == set(segmentation.ways(2))


PEAKS: list[dict[str, Any]] = json.loads(predicted_peaks.RESULTS.read_text())["rows"]


def test_the_table_of_predicted_peaks_is_that_of_the_results() -> None:
    page = predicted_peaks.PAGE.read_text()
    assert results_file.with_table(page, predicted_peaks.MARK, predicted_peaks.table(PEAKS)) == page


def test_all_predicted_peaks_are_within_the_bounds() -> None:
    """On a CPU without the workspaces of kernels, on a GPU with them. A prediction is never too high."""
    on_cpu = [row for row in PEAKS if row["device"] == "cpu"]
    assert {(row["model"], row["variant"]) for row in on_cpu} == {
        (model, variant) for model in MODELS if model != DETECTOR for variant in predicted_peaks.PREDICTED
    }
    for row in on_cpu:
        assert row["predicted"] == pytest.approx(row["without_workspaces"], rel=0.005), row
    on_gpu = [row for row in PEAKS if row["device"] == "cuda"]
    assert {row["variant"] for row in on_gpu} == {*predicted_peaks.PREDICTED}
    assert all(row["predicted"] <= row["measured"] for row in PEAKS)
    for row in on_gpu:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.05), row


def test_a_small_run_predicts_what_the_allocator_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--models", "mobilenet_v2", "--batch", "2", "--pixels", "64"]
    places = ["--gpu", tmp_path / "none.json", "--out", tmp_path / "peaks.json"]
    run(monkeypatch, predicted_peaks, *options, *places)
    rows = json.loads((tmp_path / "peaks.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [*predicted_peaks.PREDICTED]
    for row in rows:
        assert row["without_workspaces"] <= row["measured"]
        assert row["predicted"] == pytest.approx(row["without_workspaces"], rel=0.01), row
    assert predicted_peaks.PAGE.read_text().count("| mobilenet_v2 | 2 × 64 px") == 0
    assert "| mobilenet_v2 | 2 × 64 px, CPU | " in capsys.readouterr().out
