"""The experiment: a stopped grid goes on, the modes start from one network, the page says what was found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_experiment import type_command
from PIL import Image

from examples.experiment import compare_modes, training, write_page
from examples.experiment.compare_modes import Settings
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


def test_a_stopped_grid_goes_on_with_the_next_cell(
    main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ran = compare_modes.run, []

    def run_two(cell: compare_modes.Cell, settings: Settings) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell)
        return run(cell, settings)

    monkeypatch.setattr(compare_modes, "run", run_two)
    out = tmp_path / "results.json"
    grid = ["--modes", "eval", "tune", "deploy", "--lrs", "0.001", TOO_LARGE]
    with pytest.raises(KeyboardInterrupt):
        main(*grid, out=out)
    before = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in before] == ["eval", "tune"]

    ran.clear()
    monkeypatch.setattr(compare_modes, "run", lambda cell, settings: ran.append(cell) or run(cell, settings))
    rows = main(*grid, out=out)
    assert "2 of 6 cells are in" in capsys.readouterr().out
    assert [(cell.lr, cell.mode) for cell in ran] == [(0.001, "deploy"), *product([1e30], ["eval", "tune", "deploy"])]
    assert rows[:2] == before

    ran.clear()
    assert main(*grid, out=out) == rows
    assert not ran

    with pytest.raises(SystemExit, match="holds runs with .*'epochs': 1.*, not .*'epochs': 2.*; name another"):
        main(*grid, "--epochs", "2", out=out)
    assert json.loads(out.read_text())["rows"] == rows
    out.write_text('{"rows": []}')
    with pytest.raises(SystemExit, match=r"--out .*results.json: no results of this script \(KeyError.*name another"):
        main(*grid, out=out)


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


def test_in_double_precision_tune_is_eval_and_deploy_is_not(main: Main) -> None:
    options = ["--precision", "64-true", "--modes", "eval", "tune", "deploy", "--lrs", "0.1", "--epochs", "2"]
    tune, evaluated, deploy = (
        next(row["tenth_loss"] for row in rows if row["mode"] == mode)
        for rows in [main(*options)]
        for mode in ("tune", "eval", "deploy")
    )
    assert tune == pytest.approx(evaluated, rel=1e-12)
    assert abs(deploy / evaluated - 1) > 1e-6


def test_page_and_figures_are_drawn_from_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(write_page.PAGE.read_text().replace("MobileNetV2", "?"))
    monkeypatch.setattr(sys, "argv", ["write_page.py", "--page", str(page), "--figures", str(tmp_path)])
    write_page.write_page(write_page.PAGE, write_page.RESULTS, write_page.tables, write_page.draw)
    assert "| MobileNetV2: Tune |" in page.read_text()
    name = write_page.FIGURE
    with Image.open(tmp_path / name) as drawn, Image.open(write_page.BENCHMARKS / name) as committed:
        assert drawn.size == committed.size
        assert len(drawn.convert("RGB").getcolors(2**24)) > 100
        assert drawn.convert("RGBA").getextrema()[3] == (255, 255)  # opaque, for light pages and dark ones


def test_page_is_in_step_with_the_committed_results() -> None:
    report = json.loads(write_page.RESULTS.read_text())
    page = write_page.PAGE.read_text()
    assert filled(page, write_page.tables(report)) == page
    cells = {tuple(row[field] for field in compare_modes.Cell._fields) for row in report["rows"]}
    assert len(report["rows"]) == len(cells)
    nets, rates = ("mobilenet_v2", "efficientnet_lite0"), compare_modes.LEARNING_RATES
    assert {*product(nets, training.DATA, compare_modes.MODES, (0,), rates)} <= cells  # at least a whole seed


@pytest.mark.slow
def test_two_cells_at_a_time_with_a_pretrained_network(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    grid = ["--nets", "mobilenet_v2", "--data", "elpv", "--modes", "eval", "tune", "--seeds", "0", "--lrs", "0.0001"]
    small = ["--epochs", "1", "--limit", "32", "--image-size", "32", "--jobs", "2", "--out", str(out)]
    command = [sys.executable, compare_modes.__file__, *grid, *small]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = {row["mode"]: row["first_loss"] for row in json.loads(out.read_text())["rows"]}
    assert losses["tune"] == pytest.approx(losses["eval"], rel=1e-4)
