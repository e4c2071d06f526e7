"""Refuses a model that the command can't do anything with, before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_convbn.command.errors import CommandError, summary
from lightning_convbn.command.inputs import Call, Inputs, dtype_name
from lightning_convbn.layers.supported_layers import is_norm
from lightning_convbn.memory.measure import measure_memory_abstractly
from lightning_convbn.pairs.pair import ConvBNPairs


def check_has_batchnorm(model: nn.Module) -> None:
    """Raise a `CommandError` if a model has no BatchNorm, or if it has lazy parameters."""
    if not any(is_norm(module) for module in model.modules()):
        raise CommandError(f"{type(model).__name__} has no BatchNorm: there is nothing to fold or freeze")
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise CommandError(f"{type(model).__name__} is lazy (`{lazy}`): let the factory run one batch through it")


def check_takes(model: nn.Module, inputs: Inputs) -> None:
    """Raise a `CommandError` if a model's forward fails on inputs.

    It runs on tensors without data first. If that fails, it runs on the inputs.
    """
    if runs_abstractly(model, inputs.call()):
        return
    args, kwargs = inputs.call(writable=True)
    try:
        with torch.no_grad(), suppress(torch.OutOfMemoryError):  # the shape is right, even if memory is too small
            model(*args, **kwargs)
    except Exception as error:  # a user's forward may raise anything
        raise CommandError(
            f"{type(model).__name__} can't take the input {inputs}, {dtype_name(dtype_of(model))}: {summary(error)}; "
            "--input gives any other, as 8x3 or image=8x3x224x224 (--size N is an image, 3 × N × N)"
        ) from error


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first parameter of floats; float32 if there is none."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(dtypes, torch.float32)


def runs_abstractly(model: nn.Module, call: Call) -> bool:
    """Whether the forward of a model runs on these arguments as tensors without data."""
    with suppress(Exception):  # a user's forward may raise anything
        measure_memory_abstractly(model, *call, mode="train", pairs=ConvBNPairs([]), allow_real_run=False)
        return True
    return False


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raise a `CommandError` if a name to freeze has no parameter that wants a gradient."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for prefix in names:
        if not any(is_within(name, [prefix]) for name in trained):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in trained)) or "no parameters that do"
            raise CommandError(f"--freeze {prefix}: nothing of that name wants a gradient; the model has {parts}")


def is_within(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a qualified name is one of some others, or lies within it: ``layer1.0.weight`` within ``layer1``."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
