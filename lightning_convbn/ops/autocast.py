"""The state of autocast: what is computed again must be computed in the one of the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lightning_convbn.compat import is_any_autocast_on


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of a tensor; None if it is off, or not to be had there."""
    return dtype_of_autocast(tensor.device.type) if is_any_autocast_on() else None


def dtype_of_autocast(device: str) -> torch.dtype | None:
    """The dtype of autocast on a type of device; None if it is off, or not to be had there."""
    try:  # to ask first if the device has autocast takes three times as long, and PyTorch 2.9 can't compile it
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except RuntimeError:
        return None


def autocast(
    input: torch.Tensor, weight_dtype: torch.dtype, lower: torch.dtype | None
) -> tuple[torch.Tensor, torch.dtype]:
    """Return the input, cast if autocast is on, and the dtype that a convolution runs in.

    As in autocast, float64 stays float64. Without autocast a wrong dtype stays the caller's error.

    Args:
        input: What the convolution gets.
        weight_dtype: The dtype of its weight.
        lower: What `autocast_dtype` has returned.
    """
    if lower is None:
        return input, weight_dtype
    double = torch.float64
    return input if input.dtype is double else input.to(lower), weight_dtype if weight_dtype is double else lower


def in_autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a context in which autocast is as it was when `dtype_of_autocast` returned ``dtype``."""
    if dtype_of_autocast(device) is dtype:
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
