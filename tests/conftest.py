"""What all tests share."""

import contextlib
import ctypes
import gc
import logging
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.torch_settings import apply_torch_settings
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

apply_torch_settings()

# Lightning calls what newer releases of jsonargparse have deprecated, some of it when it is imported.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


# Files whose tests share a fixture that takes long.
TOGETHER = (
    "command/test_html_report.py",
    "command/test_measure.py",
    "project/test_packaging.py",
    "project/test_site.py",
    "trainer/test_kill.py",
    "trainer/test_strategies.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of such a file in one process. Else each process would build what they share."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def _less_memory() -> Iterator[None]:
    """Give freed memory back to the system. glibc keeps it, so that a process would grow to the sum of all peaks."""
    yield
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Put back what a Trainer with a distributed strategy changes, and what examples do to be quiet."""
    threads = torch.get_num_threads()
    loggers = [logging.getLogger(f"lightning.pytorch{name}") for name in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def _quick_garbage_collection() -> Iterator[None]:
    """Exclude the objects that torch made at import from garbage collection, because every count collects garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    """Read pyproject.toml."""
    return tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started as root may."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; pip install it")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def installed(project: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Declare the entry points as installing the package does, whether or not it is; return where."""
    version = project["project"]["version"]
    metadata = tmp_path / "site" / f"lightning_convbn-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lightning-convbn\nVersion: {version}\n")
    groups = project["project"]["entry-points"].items()
    lines = [line for group, named in groups for line in (f"[{group}]", *(f"{n} = {v}" for n, v in named.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(metadata.parent)
    return metadata.parent


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs write where the test does, and give them an environment of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets both and warns where there is no seed
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a few tiny images of two classes."""
    folder = tmp_path_factory.mktemp("images")
    for name, red in (("dark", 20), ("light", 200)):
        (folder / name).mkdir()
        for green in range(10):
            Image.new("RGB", (32, 32), (red, 20 * green, 0)).save(folder / name / f"{green}.png")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save weights of a MobileNetV2 that look trained, so that no network is needed."""
    from helpers.tiny_training import pretend_trained
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2()
    pretend_trained(network)
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.pth"
    torch.save(network.state_dict(), path)
    return path
