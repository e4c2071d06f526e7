"""What is published: the sdist and the wheel, built from the project and installed where there is nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

import lightning_convbn

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this project on its path; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that was built from it."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT, cwd=dist)
    return dist


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel."""
    (wheel,) = dist.glob("*.whl")
    return wheel


def metadata(wheel: Path) -> Message:
    """Read the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_the_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licences = [archive.read(name) for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert licences == [(ROOT / "LICENSE").read_bytes()]
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lightning_convbn").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert "lightning_convbn/py.typed" in sources


def test_the_sdist_holds_what_is_needed_to_test_and_to_build_it(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py", "docs/mkdocs/mkdocs.yml"}
    tops = {name.partition("/")[0] for name in names}
    allowed = {"LICENSE", "PKG-INFO", "README.md", "docs", "examples", "lightning_convbn", "pyproject.toml", "tests"}
    assert tops - {".gitignore"} == allowed


def test_the_version_stands_in_one_place(wheel: Path, project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert lightning_convbn.__version__ == version
    assert wheel.name.startswith(f"lightning_convbn-{version}-")
    assert metadata(wheel)["Version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)[1] == version
    written = [
        path.relative_to(ROOT).as_posix()
        for path in [ROOT / "README.md", *(ROOT / "lightning_convbn").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
        if version in re.findall(r"(?<![\d.])\d+\.\d+\.\d+(?![\d.])", path.read_text())
    ]
    assert written == ["docs/changelog.md"]


def test_the_metadata_says_what_pypi_shows(wheel: Path, project: dict[str, Any]) -> None:
    said = metadata(wheel)
    assert said["License-Expression"] == "Apache-2.0"
    assert said["License-File"] == "LICENSE"
    assert said["Description-Content-Type"] == "text/markdown"
    assert said["Requires-Python"] == project["project"]["requires-python"]
    needed = [need for need in said.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(need.partition(">=")[0] for need in needed) == ["fsspec", "lightning", "torch", "typing-extensions"]


INSTALLED = """
from importlib.metadata import distribution, entry_points

import torch
from torch import nn

from lightning_convbn import ConvBNModeCallback, get_mode, set_mode

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
images = torch.randn(2, 3, 8, 8)
expected = model(images)
set_mode(model, "tune")
torch.testing.assert_close(model(images), expected)
ConvBNModeCallback()
assert entry_points(group="lightning.pytorch.callbacks_factory").names == {"lightning_convbn"}
print(distribution("lightning-convbn").version)
"""


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel: Path, project: dict[str, Any], tmp_path: Path) -> None:
    """With its own dependencies alone, from PyPI: gigabytes, minutes."""
    venv = tmp_path / "venv"
    python, script = venv / "bin" / "python", venv / "bin" / "lightning-convbn"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel, cwd=tmp_path)
    assert run(python, "-c", INSTALLED, cwd=tmp_path).split() == [project["project"]["version"]]
    (tmp_path / "models.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"
    )
    assert "1 of 1 BatchNorms folded" in run(script, "inspect", "models:build", cwd=tmp_path)
    assert "wrote model.pt" in run(script, "export", "models:build", "model.pt", "--size", "16", cwd=tmp_path)
