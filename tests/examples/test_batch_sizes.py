"""The experiment of batch sizes: all cells see the same images, and the page's words follow from the numbers."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_experiment import type_command

from examples.experiment import batch_sizes, batch_sizes_page
from examples.experiment.batch_sizes import BATCH_SIZES, STEP, Cell
from examples.results_file import filled

pytestmark = pytest.mark.slow  # an experiment of the authors, which no user runs

SMALL = ["--limit", "70"]  # two steps of 32


def by_cell(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    return {(row["mode"], row["batch_size"], row["accumulate"]): row for row in rows}


def test_all_batch_sizes_see_the_same_images_and_a_second_run_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    rows = by_cell(type_command(monkeypatch, batch_sizes, out, *SMALL)["rows"])
    batches = [*((size, 1) for size in BATCH_SIZES), *((size, STEP // size) for size in BATCH_SIZES[:-1])]
    twins = {("eval", BATCH_SIZES[0], 1), ("eval", BATCH_SIZES[-1], 1)}
    assert set(rows) == {(mode, *batch) for mode, batch in product(("train", "tune"), batches)} | twins
    for (mode, size, accumulate), row in rows.items():
        assert row["steps"] * size * accumulate == 64
        assert ("accuracy_measured_again" in row) is (mode == "train")
    for twin in twins:
        assert rows[twin]["accuracy"] == rows["tune", *twin[1:]]["accuracy"]

    before = out.read_bytes()
    type_command(monkeypatch, batch_sizes, out, *SMALL)
    assert "20 of 20 cells are in" in capsys.readouterr().out
    assert out.read_bytes() == before


def test_page_is_in_step_with_the_committed_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = json.loads(batch_sizes_page.RESULTS.read_text())
    page = batch_sizes_page.PAGE.read_text()
    assert filled(page, batch_sizes_page.tables(report)) == page
    monkeypatch.setattr(sys, "argv", ["batch_sizes.py"])
    cells = batch_sizes.all_cells(batch_sizes.parse_args())
    assert sorted(cells) == sorted(Cell(*(row[field] for field in Cell._fields)) for row in report["rows"])
    assert f"{len(cells)} runs" in page
    assert (batch_sizes_page.BENCHMARKS / batch_sizes_page.FIGURE).stat().st_size < 250_000
