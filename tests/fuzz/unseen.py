"""What no proof sees: functions that take values and graph past Python's eyes, and forwards that ask or compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules import module as every_module
from torch.utils._pytree import tree_leaves


class Scale(Function):
    """Scales the gradient alone."""

    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, slope: 0.3 * slope)


class Square(Function):
    """Keeps the values that it has seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.1 * x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 0.2 * ctx.saved_tensors[0] * slope


class Spy(Function):
    """Changes values and gradients by what it has seen."""

    forward = staticmethod(lambda ctx, x: x + 0.1 * float(x.mean()))
    backward = staticmethod(lambda ctx, slope: slope / (1 + float(slope.abs().mean())))


def shifted(x: Tensor) -> Tensor:
    return 0.7 * x + 0.1


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchScript is deprecated; people use it still
    scripted = torch.jit.script(shifted)

UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "Scale": Scale.apply,
    "Square": Square.apply,
    "Spy": Spy.apply,
    "script": scripted,
}


def unseen(frame: Any, step: Any, x: Any) -> Any:
    return UNSEEN[step.name](x)


def ask(frame: Any, step: Any, x: Any) -> Any:
    """Let the result depend on the class of a layer."""
    return x * (1 + len(type(frame.model.layer(step.layer, x)).__name__) / 100)


def compute(frame: Any, step: Any, x: Any) -> Any:
    """Normalise with what a BatchNorm has, and by its flag, without a call of it."""
    bn = frame.model.layer(step.layer, x)
    if getattr(bn, "running_mean", None) is None:
        raise ValueError(f"a layer without statistics: {step!r}")
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, eps=bn.eps)


def derived(module: nn.Module) -> nn.Module:
    """Give a layer a class that inherits everything from its own."""
    cls = type(module)
    module.__class__ = type(f"Derived{cls.__name__}", (cls,), {"__module__": __name__})
    return module


EVERY_MODULE = ("forward_pre", "forward", "full_backward_pre", "full_backward")


@contextmanager
def hook_of_every_module(kind: str, seen: list[Any]) -> Iterator[None]:
    """Note what passes through all modules; nothing if no kind is given."""
    if not kind:
        yield
        return

    def note(module: nn.Module, *values: Any) -> None:
        seen.append(type(module).__name__)
        seen.extend(leaf.detach().clone() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))

    handle = getattr(every_module, f"register_module_{kind}_hook")(note)
    try:
        yield
    finally:
        handle.remove()
        every_module._global_is_full_backward_hook = None
