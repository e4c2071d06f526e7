"""The state of autocast: what is computed again must be computed in the one of the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Context = Callable[[], AbstractContextManager[Any]]


def same_autocast(device: str) -> Context:
    """Return a function that returns a context in which autocast is what it is now, on a type of device."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    state = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def context() -> AbstractContextManager[Any]:
        if state == (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)):
            return nullcontext()
        return torch.autocast(device, state[1], state[0], cache_enabled=False)

    return context
