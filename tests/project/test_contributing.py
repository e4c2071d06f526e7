"""What contributors are told agrees with the project: support policy, CI, citation, forms, changelog."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "contributing"

in_the_repository = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="the sdist is without it")


def policy() -> dict[str, list[str]]:
    """Read the table of versions: name -> lowest, newest, how long."""
    rows = re.findall(
        r"^\| (\w+) \| (.*?) \| (.*?) \| (.*?) \|$", (DOCS / "support-policy.md").read_text(), re.MULTILINE
    )
    return {name: cells for name, *cells in rows}


def workflow_text(name: str) -> str:
    """Read a workflow."""
    return (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()


def ci_jobs() -> list[dict[str, str]]:
    """Read the runs of the tests in the workflow."""
    workflow = yaml.safe_load(workflow_text("ci"))
    jobs: list[dict[str, str]] = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    return jobs


def test_the_support_policy_has_the_versions_of_the_project(project: dict[str, Any]) -> None:
    about, lowest = project["project"], {name: cells[0] for name, cells in policy().items()}
    assert about["requires-python"] == f">={lowest['Python']}"
    of_lightning = {"fsspec", "typing-extensions"}  # imported here, too
    wanted = {f"torch>={lowest['PyTorch']}", f"lightning>={lowest['Lightning']}"}
    assert set(about["dependencies"]) == wanted | of_lightning


@in_the_repository
def test_ci_runs_what_the_support_policy_says() -> None:
    lowest, newest, _ = policy()["Python"]
    runs = {(job["python"], job["command"]) for job in ci_jobs()}
    assert runs == {
        (lowest, "bash .ci/run"),
        (newest, "bash .ci/run"),
        (lowest, "python3 .ci/in_venv.py --lowest pytest -n auto"),
    }
    pins = (ROOT / ".ci" / "lowest.txt").read_text()
    for package, name in (("torch", "PyTorch"), ("lightning", "Lightning"), ("pytorch-lightning", "Lightning")):
        (pinned,) = re.findall(rf"^{package}==(.*)$", pins, re.MULTILINE)
        assert pinned.removesuffix(".0") == policy()[name][0]


@in_the_repository
@pytest.mark.parametrize("name", ["ci", "nightly", "release"])
def test_a_workflow_names_no_address_and_asks_for_no_rights_that_it_does_not_need(name: str) -> None:
    text = workflow_text(name)
    workflow = yaml.safe_load(text)
    assert "://" not in text
    assert workflow["permissions"] == {"contents": "read"}
    rights = {job: asked["permissions"] for job, asked in workflow["jobs"].items() if "permissions" in asked}
    assert rights == ({"publish": {"id-token": "write"}} if name == "release" else {})
    for file in re.findall(r"(?:uses: \./|python3 |bash )(\.(?:github|ci)/[\w/.]+)", text):
        assert (ROOT / file).is_file()


@in_the_repository
def test_what_the_release_runs_with_the_wheel_holds(monkeypatch: pytest.MonkeyPatch, project: dict[str, Any]) -> None:
    jobs = yaml.safe_load(workflow_text("release"))["jobs"]
    assert jobs["publish"]["needs"] == ["tests", "build"]
    (script,) = re.findall(r"<<'EOF'\n(.*?)^EOF$", jobs["build"]["steps"][-2]["run"], re.DOTALL | re.MULTILINE)
    monkeypatch.setenv("GITHUB_REF_NAME", f"v{project['project']['version']}")
    exec(script, {})
    monkeypatch.setenv("GITHUB_REF_NAME", "v9.9.9")
    with pytest.raises(AssertionError, match=project["project"]["version"]):
        exec(script, {})


@in_the_repository
def test_links_of_the_pages_for_github_lead_somewhere() -> None:
    for page in (ROOT / ".github").glob("[A-Z]*.md"):
        targets = re.findall(r"\]\(([^)#]+)", page.read_text())
        assert [target for target in targets if not (page.parent / target).exists()] == []


@in_the_repository
def test_the_citation_is_of_this_version_and_of_the_paper_that_the_readme_links(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["project"]["version"]
    paper = citation["preferred-citation"]
    preprint, readme = paper["identifiers"][0]["value"], (ROOT / "README.md").read_text()
    assert f"https://arxiv.org/abs/{preprint.removeprefix('arXiv:')}" in readme
    assert str(paper["year"]) in readme
    assert "(CITATION.cff)" in readme


def test_paths_in_the_guide_exist() -> None:
    text = (DOCS / "contributing.md").read_text()
    paths = re.findall(r"`((?:lightning_convbn|tests|examples|docs|\.ci)/[\w./-]*)`", text)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists() and not path.startswith(".ci")] == []
