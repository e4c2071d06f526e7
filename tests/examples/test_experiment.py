"""The experiments with a network that takes no time, and their pages, which say what was found."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.networks import randomized
from torch import nn

from examples.experiment import batch_sizes, batch_sizes_page, compare_modes, training, write_page
from examples.experiment.batch_sizes import BATCH_SIZES, STEP
from examples.experiment.networks import FEATURES, NETWORKS
from examples.results_file import filled

pytestmark = pytest.mark.slow  # experiments of the authors, which no user runs

TINY = ["--nets", "tiny", "--data", "elpv", "--seeds", "0", "--image-size", "16", "--epochs", "1"]
TOO_LARGE = "1e30"


def build_tiny(image_size: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, FEATURES, 1)]
    return randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def type_command(monkeypatch: pytest.MonkeyPatch, script: ModuleType, out: Path, *args: str) -> list[dict[str, Any]]:
    """Run a script with the network `tiny`; return the rows that it has written."""
    assert script.__file__
    monkeypatch.setitem(NETWORKS, "tiny", build_tiny)
    monkeypatch.setattr(sys, "argv", [script.__file__, *TINY, "--out", str(out), *args])
    script.main()
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["command"] == " ".join([f"python examples/experiment/{Path(script.__file__).name}", *sys.argv[1:]])
    return report["rows"]  # type: ignore[no-any-return]


def test_modes_start_alike_and_a_diverged_run_counts_as_chance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--limit", "40", "--batch-size", "8", "--lrs", "0.001", TOO_LARGE]
    rows = type_command(monkeypatch, compare_modes, tmp_path / "new" / "results.json", *arguments)
    by_mode = {row["mode"]: row for row in rows if row["lr"] == 0.001}
    assert [*by_mode] == ["train", "eval", "tune", "deploy"]
    first, tenth = ([by_mode[mode][loss] for mode in by_mode] for loss in ("first_loss", "tenth_loss"))
    assert first[1:] == pytest.approx([first[1]] * 3, rel=1e-5)
    assert abs(first[0] - first[1]) > 1e-3  # batch statistics
    assert tenth == [None] * 4  # five steps
    assert all(row["steps"] == 5 and row["cpu_ms_per_step"] > 0 and not row["diverged"] for row in by_mode.values())
    assert by_mode["tune"]["accuracy"] == by_mode["eval"]["accuracy"]
    for row in rows:
        if row["lr"] == 1e30 and row["mode"] != "train":
            assert (row["diverged"], row["accuracy"]) == (True, 0.5)
            assert row["steps"] < 5


def test_all_batch_sizes_see_the_same_images_and_a_second_run_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, arguments = tmp_path / "results.json", ["--limit", "70"]  # two steps of 32
    found = type_command(monkeypatch, batch_sizes, out, *arguments)
    rows = {(row["mode"], row["batch_size"], row["accumulate"]): row for row in found}
    batches = [*((size, 1) for size in BATCH_SIZES), *((size, STEP // size) for size in BATCH_SIZES[:-1])]
    twins = {("eval", BATCH_SIZES[0], 1), ("eval", BATCH_SIZES[-1], 1)}
    assert set(rows) == {(mode, *batch) for mode, batch in product(("train", "tune"), batches)} | twins
    for (mode, size, accumulate), row in rows.items():
        assert row["steps"] * size * accumulate == 64
        assert ("accuracy_measured_again" in row) is (mode == "train")
    for twin in twins:
        assert rows[twin]["accuracy"] == rows["tune", *twin[1:]]["accuracy"]
    before = out.read_bytes()
    type_command(monkeypatch, batch_sizes, out, *arguments)
    assert "20 of 20 cells are in" in capsys.readouterr().out
    assert out.read_bytes() == before


def test_the_page_of_the_modes_is_that_of_the_committed_results() -> None:
    report = json.loads(write_page.RESULTS.read_text())
    page = write_page.PAGE.read_text()
    assert filled(page, write_page.tables(report)) == page
    cells = {tuple(row[field] for field in compare_modes.Cell._fields) for row in report["rows"]}
    assert len(report["rows"]) == len(cells)
    nets, rates = ("mobilenet_v2", "efficientnet_lite0"), compare_modes.LEARNING_RATES
    assert {*product(nets, training.DATA, compare_modes.MODES, (0,), rates)} <= cells  # at least a whole seed


def test_the_page_of_batch_sizes_is_that_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(batch_sizes_page.RESULTS.read_text())
    page = batch_sizes_page.PAGE.read_text()
    assert filled(page, batch_sizes_page.tables(report)) == page
    monkeypatch.setattr(sys, "argv", ["batch_sizes.py"])
    cells = batch_sizes.all_cells(batch_sizes.parse_args())
    fields = batch_sizes.Cell._fields
    assert sorted(cells) == sorted(batch_sizes.Cell(*(row[field] for field in fields)) for row in report["rows"])
    assert f"{len(cells)} runs" in page
