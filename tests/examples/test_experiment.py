"""The experiment: a stopped grid goes on, the modes start from one network, the page says what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_experiment import type_command

from examples.experiment import compare_modes, training, write_page
from examples.results_file import filled

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # an experiment of the authors, which no user runs

TINY = ["--limit", "40", "--batch-size", "8"]
TOO_LARGE = "1e30"
Main = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    def typed(*args: str, out: Path = tmp_path / "new" / "results.json") -> list[dict[str, Any]]:
        report = type_command(monkeypatch, compare_modes, out, *TINY, *args)
        assert report["settings"]["limit"] == 40
        rows: list[dict[str, Any]] = report["rows"]
        return rows

    return typed


def test_modes_start_alike_and_a_diverged_run_counts_as_chance(main: Main) -> None:
    rows = main("--lrs", "0.001", TOO_LARGE)
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


def test_page_is_in_step_with_the_committed_results() -> None:
    report = json.loads(write_page.RESULTS.read_text())
    page = write_page.PAGE.read_text()
    assert filled(page, write_page.tables(report)) == page
    cells = {tuple(row[field] for field in compare_modes.Cell._fields) for row in report["rows"]}
    assert len(report["rows"]) == len(cells)
    nets, rates = ("mobilenet_v2", "efficientnet_lite0"), compare_modes.LEARNING_RATES
    assert {*product(nets, training.DATA, compare_modes.MODES, (0,), rates)} <= cells  # at least a whole seed
