"""The experiment of batch sizes: all cells see the same images, and the page's words follow from the numbers."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_experiment import type_command
from PIL import Image

from examples.experiment import batch_sizes, batch_sizes_page, page_parts
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


def test_accumulated_batches_are_one_large_batch_in_tune_mode_and_not_in_train_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def losses(mode: str) -> list[float]:
        args = [*SMALL, "--modes", mode, "--batch-sizes", "2", "32", "--epochs", "3", "--lr", "0.01"]
        rows = by_cell(type_command(monkeypatch, batch_sizes, tmp_path / f"{mode}.json", *args)["rows"])
        return [rows[mode, *batch]["last_epochs_loss"] for batch in ((2, 16), (32, 1), (2, 1))]

    added, large, small = losses("tune")
    assert added == pytest.approx(large, abs=2e-4)
    assert abs(small - large) > 1e-3
    added, large, _ = losses("train")
    assert abs(added - large) > 1e-3


def test_statistics_are_measured_again_on_all_training_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With one image per channel's batch the running statistics are far off; measured again they fit."""
    models = []
    score = batch_sizes.score
    monkeypatch.setattr(batch_sizes, "score", lambda *args: models.append(args[1]) or score(*args))
    args = [*SMALL, "--modes", "train", "--batch-sizes", "2"]
    type_command(monkeypatch, batch_sizes, tmp_path / "results.json", *args)
    settings = batch_sizes.Settings(1, 70, 16, 0.0003)
    images = batch_sizes._images("elpv", 0, settings).train.tensors[0]
    conv, norm = models[0].backbone[:2]
    torch.testing.assert_close(norm.running_mean, conv(images).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def row_of(mode: str, batch_size: int, seed: int, accuracy: float, **others: Any) -> dict[str, Any]:
    row = {"net": "mobilenet_v2", "data": "elpv", "mode": mode, "seed": seed, "batch_size": batch_size, "accumulate": 1}
    again = {"accuracy_measured_again": accuracy} if mode == "train" else {}
    return {**row, "accuracy": accuracy, "plain_accuracy": accuracy + 0.01, "diverged": False, **again, **others}


ROWS = [
    *(row_of("train", 2, seed, 0.60 + seed / 100) for seed in range(3)),
    *(row_of("tune", 2, seed, 0.70 - seed / 100) for seed in range(3)),
    *(row_of("train", 32, seed, 0.80, accuracy_measured_again=0.7) for seed in range(3)),
    *(row_of("tune", 32, seed, 0.75 + seed / 100) for seed in range(3)),
    *(row_of("train", 2, seed, 0.70, accumulate=16) for seed in range(3)),
    *(row_of("tune", 2, seed, 0.70 + 0.2 * (seed - 0.8), accumulate=16) for seed in range(3)),
    row_of("eval", 2, 0, 0.69),
]


def test_page_is_filled_and_the_figure_is_opaque(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marks = ("batches", "against", "facts", "accuracy", "plain", "eval")
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("".join(f"<!-- {mark} -->\n<!-- /{mark} -->\n" for mark in marks))
    settings = {"epochs": 2, "limit": 384, "image_size": 72, "lr": 0.0003, "head_lr": 0.01}
    report = {"rows": ROWS, "settings": settings, "machine": {"cpu": "A CPU"}, "versions": {"torch": "2"}}
    results.write_text(json.dumps({**report, "command": "python examples/experiment/batch_sizes.py"}))
    folders = ["--page", str(page), "--figures", str(tmp_path), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["batch_sizes_page.py", *folders])
    page_parts.write_page(batch_sizes_page.PAGE, results, batch_sizes_page.tables, batch_sizes_page.draw)
    filled = page.read_text()
    assert all(f"<!-- {mark} -->\n<!--" not in filled for mark in marks)
    assert "19 runs: seeds 0 (7 runs), 1 (6 runs), 2 (6 runs)" in filled
    with Image.open(tmp_path / batch_sizes_page.FIGURE) as drawn:
        assert drawn.convert("RGBA").getextrema()[3] == (255, 255)
        assert len(drawn.convert("RGB").getcolors(2**24) or ()) > 100


def test_page_is_in_step_with_the_committed_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = json.loads(batch_sizes_page.RESULTS.read_text())
    page = batch_sizes_page.PAGE.read_text()
    assert filled(page, batch_sizes_page.tables(report)) == page
    monkeypatch.setattr(sys, "argv", ["batch_sizes.py"])
    cells = batch_sizes.all_cells(batch_sizes.parse_args())
    assert sorted(cells) == sorted(Cell(*(row[field] for field in Cell._fields)) for row in report["rows"])
    assert f"{len(cells)} runs" in page
    assert (batch_sizes_page.BENCHMARKS / batch_sizes_page.FIGURE).stat().st_size < 250_000
