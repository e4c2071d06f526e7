"""Hooks before the forward of a module, where a call of the module runs its own forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_convbn.compat import inside_transform
from lightning_convbn.layers.state import UncopiedHook

ForwardHook = Callable[[tuple[Any, ...], dict[str, Any]], None]


def before_forwards(module: nn.Module, call: ForwardHook) -> Callable[[], None]:
    """Call a function with the arguments of each forward of a module, just before it.

    In a transform of ``torch.func`` it is not called: no tensor can be looked at there.

    Returns:
        What ends that.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _runs_its_forward(module) and not inside_transform():
            call(args, kwargs)

    return module.register_forward_pre_hook(UncopiedHook(before), with_kwargs=True).remove


def _runs_its_forward(module: nn.Module) -> bool:
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
