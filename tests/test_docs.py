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
import pytest
import torch

from lightning_convbn import layers, reasons

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
    with mock.patch.dict(layers.CONV_LAYERS), mock.patch.dict(layers.NORM_LAYERS):
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


@pytest.mark.parametrize(("row", "table"), [("convolutions", layers.CONV_LAYERS), ("BatchNorms", layers.NORM_LAYERS)])
def test_readme_names_the_table_of_supported_layers(row: str, table: dict[type | str, object]) -> None:
    (claim,) = re.findall(rf"^\| {row} \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    supported = {key.rpartition(".")[2] if isinstance(key, str) else key.__name__ for key in table}
    assert sorted(re.findall(r"`(\w+)`", claim)) == sorted(supported)


def test_every_reason_is_in_the_troubleshooting_table() -> None:
    documented = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    for name, reason in vars(reasons).items():
        if name.isupper():
            assert re.sub(r"`?\{.*?\}`?", "…", reason) in documented, name


def test_memory_tables_come_from_the_committed_counts() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "memory.json").read_text())["rows"]
    readme = (ROOT / "README.md").read_text()
    assert memory_table.with_table(readme, rows) == readme
    assert memory_table.as_markdown(rows) == (ROOT / "docs" / "benchmarks" / "memory.md").read_text()


def test_deploy_table_comes_from_the_committed_times() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "deploy.json").read_text())["rows"]
    assert deploy_table.as_markdown(rows) == (ROOT / "docs" / "benchmarks" / "deploy.md").read_text()
    assert all(row["onnx_nodes"]["deploy"] <= row["onnx_nodes"]["eval"] for row in rows)


def test_coverage_table_comes_from_the_committed_counts() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "coverage.json").read_text())["rows"]
    assert coverage_table.as_markdown(rows) == (ROOT / "docs" / "coverage.md").read_text()


@pytest.mark.parametrize("name", ["timm:efficientnet_b0", "timm:repvgg_a0", "torchvision:retinanet_resnet50_fpn"])
def test_committed_coverage_is_still_so(name: str) -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "coverage.json").read_text())["rows"]
    assert coverage_table.count(name) == next(row for row in rows if row["model"] == name)
