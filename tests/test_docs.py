"""The README and the docs say what is so: their code runs, their tables agree with code and committed counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import coverage_table
import deploy_table
import memory_table
import overhead_table
import pytest
import several_processes
import test_loggers
import test_other_callbacks
import test_precision
import torch

from lightning_convbn import activations, layers, reasons

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tables = (layers.CONV_LAYERS, layers.NORM_LAYERS, activations.ACTIVATION_LAYERS)
    with mock.patch.dict(tables[0]), mock.patch.dict(tables[1]), mock.patch.dict(tables[2]):
        exec(compile(block, "docs", "exec"), types.ModuleType("docs").__dict__)


def test_exported_files_load_as_the_docs_say_where_the_package_can_not_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "export.md").read_text()
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
    ("row", "table"),
    [
        ("convolutions", layers.CONV_LAYERS),
        ("BatchNorms", layers.NORM_LAYERS),
        ("activations recomputed", activations.ACTIVATION_LAYERS),
    ],
)
def test_readme_names_the_table_of_supported_layers(row: str, table: dict[type | str, object]) -> None:
    (claim,) = re.findall(rf"^\| {row} \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    supported = {key.rpartition(".")[2] if isinstance(key, str) else key.__name__ for key in table}
    assert set(re.findall(r"`(\w+)`", claim)) == supported


def test_every_reason_is_in_the_troubleshooting_table() -> None:
    documented = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    for name, reason in vars(reasons).items():
        if name.isupper():
            assert re.sub(r"`?\{.*?\}`?", "…", reason) in documented, name


def test_memory_tables_come_from_the_committed_counts() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "memory.json").read_text())["rows"]
    for page, mark in memory_table.MARKS.items():
        assert memory_table.with_table(page.read_text(), mark, rows) == page.read_text()
    assert memory_table.as_markdown(rows) == (ROOT / "docs" / "benchmarks" / "memory.md").read_text()


def test_deploy_table_comes_from_the_committed_times() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "deploy.json").read_text())["rows"]
    assert deploy_table.as_markdown(rows) == (ROOT / "docs" / "benchmarks" / "deploy.md").read_text()
    assert all(row["onnx_nodes"]["deploy"] <= row["onnx_nodes"]["eval"] for row in rows)


def test_overhead_table_comes_from_the_committed_times_and_is_within_the_noise() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "overhead.json").read_text())["rows"]
    assert overhead_table.as_markdown(rows) == (ROOT / "docs" / "benchmarks" / "overhead.md").read_text()
    assert all(0.99 <= row["ratio"] <= 1.01 for row in rows)


def test_coverage_table_comes_from_the_committed_counts() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "coverage.json").read_text())["rows"]
    assert coverage_table.as_markdown(rows) == (ROOT / "docs" / "coverage.md").read_text()


@pytest.mark.parametrize("name", ["timm:efficientnet_b0", "timm:repvgg_a0", "torchvision:retinanet_resnet50_fpn"])
def test_committed_coverage_is_still_so(name: str) -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "coverage.json").read_text())["rows"]
    assert coverage_table.count(name) == next(row for row in rows if row["model"] == name)


def test_lightning_matrix_and_tests_are_in_step() -> None:
    """Every row that works names a test that exists; whatever those tests run over has a row; refusals are quoted."""
    page = (ROOT / "docs" / "lightning.md").read_text()
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| .* \|$", page, re.MULTILINE)]
    rows = [row for row in rows if row[1] != "state"]
    sources = "".join(path.read_text() for path in (ROOT / "lightning_convbn").glob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)
    named = set()
    for feature, state, test in rows:
        assert state.startswith(("works", "refused: `", "not tested here", "that pair is frozen")), feature
        if state.startswith("refused"):
            assert state.split("`")[1] in said, feature
        if not state.startswith("not tested"):
            file, _, rest = test.strip("`").partition("::")
            function, _, parameter = rest.partition("[")
            assert (ROOT / "tests" / file).exists(), test
            assert not function or f"def {function}(" in (ROOT / "tests" / file).read_text(), test
            named.add((function, parameter.rstrip("]")))
    for function, parameters in (
        ("test_the_loss_curve_in_several_processes_is_evals", {*several_processes.RUNS} - {"ddp", "deceptive"}),
        ("test_the_error_of_tune_is_evals", {getattr(one, "values", [one])[0] for one in test_precision.PRECISIONS}),
        ("test_a_run_with_another_callback_is_evals", {*test_other_callbacks.OTHERS}),
        ("test_every_key_arrives_once", {*test_loggers.LOGGERS, "+".join(test_loggers.LOGGERS)}),
    ):
        assert {parameter for name, parameter in named if name == function} == parameters
