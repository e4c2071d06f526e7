"""The comparison of predicted peaks with the allocator's: its committed results, its table, and a small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.benchmarks import predicted_peaks
from examples.benchmarks.networks import DETECTOR, MODELS
from examples.results_file import with_table

pytestmark = pytest.mark.slow  # a benchmark of the authors, which no user runs

ROWS: list[dict[str, Any]] = json.loads(predicted_peaks.RESULTS.read_text())["rows"]


def test_the_table_is_that_of_the_results() -> None:
    page = predicted_peaks.PAGE.read_text()
    assert with_table(page, predicted_peaks.MARK, predicted_peaks.table(ROWS)) == page


def test_all_that_was_measured_is_within_the_bounds() -> None:
    """On a CPU without the workspaces of kernels, on a GPU with them. A prediction is never too high."""
    on_cpu = [row for row in ROWS if row["device"] == "cpu"]
    assert {(row["model"], row["variant"]) for row in on_cpu} == {
        (model, variant) for model in MODELS if model != DETECTOR for variant in predicted_peaks.PREDICTED
    }
    for row in on_cpu:
        assert row["predicted"] == pytest.approx(row["without_workspaces"], rel=0.005), row
    on_gpu = [row for row in ROWS if row["device"] == "cuda"]
    assert {row["variant"] for row in on_gpu} == {*predicted_peaks.PREDICTED}
    assert all(row["predicted"] <= row["measured"] for row in ROWS)
    for row in on_gpu:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.05), row


def test_a_small_run_predicts_what_the_allocator_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--models", "mobilenet_v2", "--batch", "2", "--pixels", "64"]
    places = ["--gpu", tmp_path / "none.json", "--out", tmp_path / "peaks.json"]
    monkeypatch.setattr("sys.argv", ["predicted_peaks.py", *options, *map(str, places)])
    predicted_peaks.main()
    rows = json.loads((tmp_path / "peaks.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [*predicted_peaks.PREDICTED]
    for row in rows:
        assert row["without_workspaces"] <= row["measured"]
        assert row["predicted"] == pytest.approx(row["without_workspaces"], rel=0.01), row
    assert predicted_peaks.PAGE.read_text().count("| mobilenet_v2 | 2 × 64 px") == 0
    assert "| mobilenet_v2 | 2 × 64 px, CPU | " in capsys.readouterr().out
