"""The README and the docs say what is so: their code runs, their tables agree with code and committed counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from helpers.lightning_matrix import section
from helpers.tiny_training import LIGHTNING_SAYS
from torch import nn
from torch._functorch import config as functorch_config
from torchvision.ops import FrozenBatchNorm2d

from examples.benchmarks import (
    against_revision,
    coverage_of_models,
    detectors,
    figures,
    host_time,
    memory_budget,
)
from examples.benchmarks import memory as memory_table
from examples.results_file import BENCHMARKS, filled
from lightning_convbn import measure_memory
from lightning_convbn.blocks import reasons as block_reasons
from lightning_convbn.layers import supported_layers
from lightning_convbn.ops import elementwise
from lightning_convbn.pairs import reasons

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block of Python, with the comment in front of it that names another test which runs it.
PYTHON = re.compile(r"(?:<!-- run by (\S+) -->\n+)?^ *```py.*?\n(.*?)```", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, (elsewhere, block) in enumerate(PYTHON.findall(page.read_text()))
    if not elsewhere
]

pytestmark = LIGHTNING_SAYS


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tables: tuple[dict[Any, Any], ...] = (supported_layers.CONV_LAYERS, supported_layers.NORM_LAYERS, elementwise.ROWS)
    budget = functorch_config.patch(activation_memory_budget=1.0)  # a block sets another one
    with mock.patch.dict(tables[0]), mock.patch.dict(tables[1]), mock.patch.dict(tables[2]), budget:
        exec(compile(block, "docs", "exec"), types.ModuleType("docs").__dict__)


def test_the_quickstart_prints_the_table_that_it_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of it but what rounding decides."""
    page = (ROOT / "docs" / "index.md").read_text()
    fences = re.findall(r"^```(python|text)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (_, block), (_, table) = fences
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs", "exec"), types.ModuleType("docs").__dict__)
    printed = capfd.readouterr()
    for line in table.splitlines():
        assert line.partition("relative deviation")[0] in printed.out + printed.err


def test_blocks_run_elsewhere_are_read_there() -> None:
    marked = {
        (page.name, test)
        for page in PAGES
        for test, _ in PYTHON.findall(page.read_text())
        if test and page.name in (ROOT / test).read_text()
    }
    assert marked == {
        ("flags-yaml-environment.md", "tests/trainer/test_cli.py"),
        ("export.md", "tests/project/test_docs.py"),
        ("other-trainers.md", "tests/examples/test_other_trainers.py"),
        ("other-trainers.md", "tests/examples/test_ultralytics_yolo.py"),
        ("first-fine-tuning.md", "tests/examples/test_tutorial.py"),
    }


def test_exported_files_load_as_the_docs_say_where_the_package_can_not_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "use" / "export.md").read_text()
    exports = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    loads = re.findall(r"```python title=.*?\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(exports, "docs", "exec"), namespace := {})
    with torch.no_grad():
        expected = namespace["model"].eval()(torch.ones(5, 3, 64, 64))
    torch.save(expected, "expected")
    checks = [
        "images[:] = 1; (output,) = session.run(None, {session.get_inputs()[0].name: images})",
        "output = model(torch.ones(5, 3, 64, 64))",
        "output = model(torch.ones(5, 3, 64, 64))",
    ]
    compared = (
        "import torch\n"
        "found, expected = torch.as_tensor(output).detach(), torch.load('expected')\n"
        "torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)"
    )
    blocked = "import sys; sys.modules['lightning_convbn'] = None"
    script = [line for load, check in zip(loads, checks, strict=True) for line in (load, check, compared)]
    command = [sys.executable, "-c", "\n".join([blocked, *script])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("row", "rows"),
    [
        ("convolutions", supported_layers.CONV_LAYERS),
        ("BatchNorms", supported_layers.NORM_LAYERS),
        ("activations", elementwise.ACTIVATIONS),
        ("arithmetic", (*elementwise.PRODUCTS, *elementwise.SUMS)),
        ("other normalisations", elementwise.NORMS),
        ("concatenations", elementwise.CONCATENATIONS),
        ("views and copies", (*elementwise.VIEWS, *elementwise.COPIES)),
    ],
)
def test_the_page_of_supported_layers_names_the_table(row: str, rows: Iterable[type | str]) -> None:
    page = (ROOT / "docs" / "use" / "supported-layers.md").read_text()
    (claim,) = re.findall(rf"^\| {row} \| (.*) \|$", page, re.MULTILINE)
    supported = {key.rpartition(".")[2] if isinstance(key, str) else key.__name__ for key in rows}
    assert set(re.findall(r"`(\w+)`", claim)) == supported


def test_every_reason_is_in_the_troubleshooting_table() -> None:
    documented = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "use" / "troubleshooting.md").read_text(), re.MULTILINE)
    for name, reason in (vars(reasons) | vars(block_reasons)).items():
        if name.isupper():
            assert re.sub(r"`?\{.*?\}`?", "…", reason) in documented, name


def test_memory_tables_come_from_the_committed_counts() -> None:
    counts = json.loads((ROOT / "docs" / "benchmarks" / "memory.json").read_text())
    rows = counts["rows"]
    page = memory_table.PAGE.read_text()
    assert filled(page, memory_table.excerpts(rows)) == page
    assert (
        memory_table.as_markdown(rows, counts["input_gradients"])
        == (ROOT / "docs" / "benchmarks" / "memory.md").read_text()
    )


@pytest.mark.parametrize(
    ("script", "results", "page", "mark"),
    [
        (against_revision, "against-revision", against_revision.PAGE, against_revision.MARK),
        (coverage_of_models, "coverage", BENCHMARKS / "coverage.md", "table"),
        (detectors, "detectors", BENCHMARKS / "detectors.md", "table"),
        (host_time, "host_time", host_time.PAGE, host_time.MARK),
        (memory_budget, "memory_budget", memory_budget.PAGE, memory_budget.MARK),
    ],
)
def test_a_table_comes_from_its_results(script: types.ModuleType, results: str, page: Path, mark: str) -> None:
    rows = json.loads((BENCHMARKS / f"{results}.json").read_text())["rows"]
    assert filled(text := page.read_text(), {mark: script.table(rows)}) == text
    assert f"<!-- {mark} -->" in text


@pytest.mark.parametrize("name", ["memory", "modes"])
def test_pictures_are_what_the_script_draws(name: str, tmp_path: Path) -> None:
    """By their texts, which matplotlib notes beside the outlines; those differ from release to release."""
    rows = json.loads((ROOT / "docs" / "benchmarks" / "memory.json").read_text())["rows"]
    drawn = tmp_path / "drawn.svg"
    if name == "memory":
        figures.draw_memory(rows, drawn)
    else:
        figures.draw_modes(drawn)
    texts = [re.findall("<!-- (.*?) -->", file.read_text()) for file in (drawn, figures.FOLDER / f"{name}.svg")]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 15


def test_what_is_kept_with_frozen_parameters_is_what_the_table_of_choices_says() -> None:
    def kept(model: nn.Module, images: torch.Tensor) -> tuple[int, int]:
        eval_use, tune_use = (measure_memory(model, images, mode=mode) for mode in ("eval", "tune"))
        return eval_use.saved_bytes, tune_use.saved_bytes

    images = torch.randn(2, 3, 32, 32)
    resnet = torchvision.models.resnet18().eval()
    trained = kept(resnet, images)
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    assert kept(resnet, images)[0] == pytest.approx(trained[0], rel=0.01)
    assert kept(resnet, images)[1] < 0.6 * trained[0]
    frozen = kept(torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d).eval(), images)
    assert frozen[0] == pytest.approx(frozen[1], rel=0.05)
    pair = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval().requires_grad_(False)
    output = 2 * 8 * 30 * 30 * 4
    eval_bytes, tune_bytes = kept(pair, images.requires_grad_())
    assert eval_bytes - tune_bytes >= output
    assert tune_bytes < 0.01 * output


@pytest.mark.parametrize("name", ["timm:efficientnet_b0", "timm:repvgg_a0", "torchvision:retinanet_resnet50_fpn"])
def test_committed_coverage_is_still_so(name: str) -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "coverage.json").read_text())["rows"]
    assert coverage_of_models.count(name) == next(row for row in rows if row["model"] == name)


def test_what_works_with_lightning_names_tests_and_refusals_are_quoted() -> None:
    """That it names what the tests of many features run is tested beside each of them."""
    files = re.findall(r"`([\w/]+\.py)`", section("Works"))
    assert len(files) > 10
    assert [file for file in files if not (ROOT / "tests" / file).exists()] == []
    sources = "".join(path.read_text() for path in (ROOT / "lightning_convbn").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)
    refusals = re.findall(r"\| refused: `(.*?)` \|", section("Does not work"))
    assert len(refusals) > 3
    assert [refusal for refusal in refusals if refusal not in said] == []
