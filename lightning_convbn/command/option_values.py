"""Turns the text of options into values: ``--size``, ``--input-shape``, ``--budget``, ``--device``, ``--dtype``."""

from __future__ import annotations

import re
from argparse import Namespace

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


def sample_shape(size: str) -> tuple[int, ...]:
    """Return the shape of one sample, without the batch, from ``--size``.

    Example:
        >>> sample_shape("224"), sample_shape("1x28x28")
        ((3, 224, 224), (1, 28, 28))
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise CommandError(
            f"--size {size!r} is neither a number of pixels, as 224, nor a shape without batch, as 1x28x28"
        )
    sizes = tuple(map(int, size.split("x")))
    return (3, *sizes, *sizes) if len(sizes) == 1 else sizes


def input_shape(options: Namespace) -> tuple[int, ...]:
    """Return the shape of an input, with the batch, from ``--input-shape``, or from ``--batch-size`` and ``--size``."""
    if options.input_shape is None:
        return (options.batch_size or options.default_batch, *sample_shape(options.size))
    if options.batch_size is not None:
        raise CommandError(f"--input-shape {options.input_shape} has the batch in it: leave out --batch-size")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", options.input_shape):
        raise CommandError(f"--input-shape {options.input_shape!r} is no shape with the batch, as 8x3 or 8x3x224x224")
    return tuple(map(int, options.input_shape.split("x")))


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
