"""The script that runs a command in the project's own environment, with stand-ins for pip and uv.

The stand-ins write down what they are asked for and install nothing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="the sdist is without it")

PIP = """
import os, pathlib, sys
with open(os.environ["ASKED"], "a") as file:
    print("pip", *sys.argv[1:], file=file)
if "uv" in sys.argv and not os.environ.get("NO_UV"):
    package = pathlib.Path(__file__).parents[1] / "uv"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(os.environ["UV"])
sys.exit("uv" in sys.argv and bool(os.environ.get("NO_UV")))
"""
UV = """
import os, sys
if "--version" not in sys.argv:
    with open(os.environ["ASKED"], "a") as file:
        print("uv", *sys.argv[1:], file=file)
    sys.exit(bool(os.environ.get("UV_FAILS")))
"""
SHOW = ["python", "-c", "import sys; print(sys.prefix)"]


class Project:
    """A copy of the script in a folder that looks like the project."""

    def __init__(self, root: Path) -> None:
        self.root, self.packages, self.asked = root, root / "packages", root / "asked"
        (root / ".ci").mkdir()
        for name in ("in_venv.py", "lowest.txt"):
            shutil.copy(ROOT / ".ci" / name, root / ".ci")
        (root / "pyproject.toml").write_text("[project]\n")
        self.install("pip", PIP)

    def install(self, name: str, source: str) -> None:
        """Put a stand-in where Python finds it first."""
        (self.packages / name).mkdir(parents=True)
        (self.packages / name / "__init__.py").touch()
        (self.packages / name / "__main__.py").write_text(source)

    def run(self, *command: str, status: int = 0, **environment: str) -> str:
        """Type a command; return what it prints."""
        # Without the folders of a real uv.
        path = [folder for folder in os.environ["PATH"].split(os.pathsep) if not shutil.which("uv", path=folder)]
        own = {"PYTHONPATH": str(self.packages), "ASKED": str(self.asked), "UV": UV, "PATH": os.pathsep.join(path)}
        done = subprocess.run(
            [sys.executable, str(self.root / ".ci" / "in_venv.py"), *command],
            cwd=self.root,
            env={**os.environ, **own, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def installed_by(self) -> list[str]:
        """What has installed the project with the extra of the tests, in order."""
        return [line.split()[0] for line in self.asked_for() if "--editable .[test]" in line]

    def asked_for(self) -> list[str]:
        """All that pip and uv were asked for."""
        return self.asked.read_text().splitlines() if self.asked.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_a_script_gets_what_it_needs_and_the_tests_add_theirs(project: Project) -> None:
    project.install("uv", UV)
    (project.root / "examples").mkdir()
    (project.root / "examples" / "finetune.py").touch()
    for command in (["python", "examples/finetune.py"], SHOW, ["python", "examples/finetune.py"], SHOW):
        project.run(*command)
    assert [line.split("--editable ")[1] for line in project.asked_for()] == [".[finetune]", ".[test]"]


needs_no_uv = pytest.mark.skipif(importlib.util.find_spec("uv") is not None, reason="a real uv can be imported")


@pytest.mark.parametrize("name", [".venv", ".venv-lowest"])
def test_the_command_runs_in_an_environment_that_is_set_up_once(project: Project, name: str) -> None:
    project.install("uv", UV)
    command = [*["--lowest"] * (name == ".venv-lowest"), *SHOW]
    assert project.run(*command).splitlines()[-1] == str(project.root / name)
    assert project.run(*command).splitlines() == [str(project.root / name)]
    assert project.installed_by() == ["uv"]
    assert ("lowest.txt" in project.asked.read_text()) == (name == ".venv-lowest")


def test_it_is_brought_up_to_date_when_the_project_has_changed(project: Project) -> None:
    project.install("uv", UV)
    project.run(*SHOW)
    kept = project.root / ".venv" / "kept"
    kept.touch()
    (project.root / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert "Setting up" in project.run(*SHOW)
    assert project.installed_by() == ["uv", "uv"]
    assert kept.exists()


@needs_no_uv
def test_pip_installs_uv_where_there_is_none(project: Project) -> None:
    project.run(*SHOW)
    assert project.installed_by() == ["uv"]


@needs_no_uv
def test_pip_does_it_where_uv_can_not_be_had(project: Project) -> None:
    project.run(*SHOW, NO_UV="1")
    assert project.installed_by() == ["pip"]


def test_pip_does_it_where_uv_fails(project: Project) -> None:
    project.install("uv", UV)
    assert "now pip does" in project.run(*SHOW, UV_FAILS="1")
    assert project.installed_by() == ["uv", "pip"]


def test_what_failed_is_tried_again(project: Project) -> None:
    project.install("uv", UV)
    (project.packages / "pip" / "__main__.py").write_text("import sys; sys.exit(3)")
    assert "Error" in project.run(*SHOW, status=1, UV_FAILS="1")
    assert project.run(*SHOW).splitlines()[-1] == str(project.root / ".venv")


def test_the_status_of_the_command_is_passed_on(project: Project) -> None:
    project.install("uv", UV)
    project.run("python", "-c", "raise SystemExit(7)", status=7)
    assert "'no-such-program' is neither in" in project.run("no-such-program", status=127)
    assert "in_venv.py pytest" in project.run(status=2)
