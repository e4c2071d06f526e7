"""Turns the text of options into values: ``--budget``, ``--device``, ``--dtype``."""

from __future__ import annotations

import torch

from lightning_convbn.command.errors import CommandError
from lightning_convbn.memory.budget import size_in_bytes
from lightning_convbn.text import first_line


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a dtype.

    Example:
        >>> dtype_name(torch.float32)
        'float32'
    """
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


def budget_bytes(budget: str) -> int:
    """Return the number of bytes from ``--budget``.

    Example:
        >>> budget_bytes("8GiB")
        8589934592
    """
    try:
        return size_in_bytes(budget)
    except ValueError as error:
        raise CommandError(f"--budget {error}") from error


def chosen_device(name: str | None) -> torch.device:
    """Return the device from ``--device``. Without the option it is CUDA if there is a CUDA device, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except Exception as error:  # PyTorch raises different classes for unknown, missing and unsupported devices
        raise CommandError(f"--device {name!r} can't be used: {first_line(error)}") from error
