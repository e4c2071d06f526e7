"""Whether a call of a module runs its own forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def runs_its_forward(module: nn.Module) -> bool:
    """Whether a call of a module runs its own forward.

    For a training step DDP and other strategies call the LightningModule, too. Then its ``forward`` is replaced, for
    that one call, by a function that runs ``training_step``.
    """
    return not hasattr(module, "training_step") or _function(module.forward) is _function(type(module).forward)


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the plain function behind a method, without what ``torch.compile`` or a decorator has put around it."""
    unwrapped = inspect.unwrap(method)
    function: Callable[..., Any] = getattr(unwrapped, "__func__", unwrapped)
    return function
