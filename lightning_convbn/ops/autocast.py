"""The state of autocast: what is computed again must be computed in the one of the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a type of device; None if it is off, or not to be had there."""
    try:  # to ask first if the device has autocast takes three times as long, and PyTorch 2.9 can't compile it
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except RuntimeError:
        return None


def in_autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a context in which autocast is as it was when `autocast_dtype` returned ``dtype`` for a type of device."""
    if autocast_dtype(device) is dtype:
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
