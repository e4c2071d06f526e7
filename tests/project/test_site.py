"""The docs as a site: it builds strictly without a network, is complete, and can be read in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import lightning_convbn

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md"))
FAST = ("index.md", "understand/fold.md")  # a picture and code; equations and tables
OFFLINE = """
import socket

def refuse(*_):
    raise OSError("the docs are built without a network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the docs as the guide for contributors says, without a network."""
    options = [
        "build",
        "--strict",
        "--config-file",
        str(root / "docs" / "mkdocs" / "mkdocs.yml"),
        "--site-dir",
        str(site),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", OFFLINE, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built."""
    site = tmp_path_factory.mktemp("site")
    built = build(ROOT, site)
    assert built.returncode == 0, built.stderr
    return site


def url_of(page: Path) -> str:
    """Return the address of a page in the site."""
    folder = page.parent if page.name == "index.md" else page.with_suffix("")
    return "" if folder == Path() else f"{folder.as_posix()}/"


def test_every_page_is_in_the_navigation(site: Path) -> None:
    assert "docs/mkdocs/mkdocs.yml" in (ROOT / "docs" / "contributing" / "contributing.md").read_text()
    home = (site / "index.html").read_text()
    linked = re.findall(r'<a href="([^"#]*)" class="md-nav__link', home)
    assert {link.removeprefix("./").removeprefix(".") for link in linked} == {url_of(page) for page in PAGES}


def test_a_page_out_of_the_navigation_a_dead_link_and_a_dead_anchor_are_errors(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "lightning_convbn", tmp_path / "lightning_convbn")
    (tmp_path / "docs" / "stray.md").write_text("[dead](nowhere.md), [broken](use/callback.md#nowhere)\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    assert re.search(r"not included in the \"nav\" configuration:\s+- stray.md", built.stderr)
    assert "contains a link 'nowhere.md', but the target is not found" in built.stderr
    assert "does not contain an anchor '#nowhere'" in built.stderr


def test_the_map_of_the_package_names_every_file() -> None:
    page = (ROOT / "docs" / "contributing" / "architecture.md").read_text()
    (tree,) = re.findall(r"```text\n(lightning_convbn/\n.*?)```", page, re.DOTALL)
    folders, named = [], set()
    for spaces, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE):
        del folders[len(spaces) // 4 :]
        named.add("".join([*folders, name]))
        folders.append(name)
    package = ROOT / "lightning_convbn"
    files = {path.relative_to(ROOT).as_posix() for suffix in ("py", "html") for path in package.rglob(f"*.{suffix}")}
    inside_folders = {name for name in files if name.count("/") > 1 and name.endswith("__init__.py")}
    assert {name for name in named if not name.endswith("/")} == files - inside_folders


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = (site / "api" / "index.html").read_text()
    documented = set(re.findall(r'<h3 id="lightning_convbn\.(\w+)" class="doc', reference))
    assert documented == set(lightning_convbn.__all__)
    assert 'id="lightning_convbn.cli.ConvBNCLI"' in reference


class Quiet(SimpleHTTPRequestHandler):
    """A file server that prints nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Serve the site on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module", params=[1280, 360], ids=["wide", "phone"])
def tab(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """A tab, wide or as narrow as a phone. It notes requests to other servers, and errors of the page."""
    tab = browser.new_page(viewport={"width": request.param, "height": 800})
    tab.amiss = []
    tab.on(
        "request", lambda one: None if one.url.startswith((address, "data:", "blob:")) else tab.amiss.append(one.url)
    )
    tab.on("console", lambda message: tab.amiss.append(message.text))
    tab.on("pageerror", lambda error: tab.amiss.append(str(error)))
    yield tab
    tab.close()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if str(page) in FAST else pytest.mark.slow) for page in PAGES],
    ids=str,
)
def test_a_page_can_be_read_wide_and_on_a_phone(tab: Any, address: str, page: Path) -> None:
    """Nothing is loaded from another server, nothing is broken, and the page does not scroll sideways."""
    tab.amiss.clear()
    tab.goto(address + url_of(page))
    assert tab.amiss == []
    assert tab.evaluate("document.documentElement.scrollWidth") == tab.viewport_size["width"]
    assert tab.locator("article h1").count() == 1
    assert all(tab.locator("article img").evaluate_all("images => images.map(image => image.naturalWidth > 0)"))
    fences = (ROOT / "docs" / page).read_text().count("```math")
    equations = tab.locator("article math").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert len(equations) == fences
    assert all(width > 50 for width in equations)
    text = tab.locator("article").inner_text()
    assert not [markup for markup in ("```", "<!--", "\n::: ", "](") if markup in text]


def test_the_search_finds_a_word(browser: Any, address: str) -> None:
    tab = browser.new_page()
    tab.goto(address)
    tab.get_by_role("textbox", name="Search").press_sequentially("BackboneFinetuning")
    tab.locator(".md-search-result__link", has_text="The callback").first.wait_for(timeout=10_000)
    tab.close()
