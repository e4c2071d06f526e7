"""Putting back what a forward pass moves beside its output."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves


@contextmanager
def state_kept(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Put random state and buffers back: a forward pass in Train mode moves both.

    Autocast's cache is off meanwhile: a weight that it casts without gradients, or as a FakeTensor, would stay in use.
    """
    tensors = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in (*tensors, *model.parameters()) if tensor.device.type == "cuda"}
    with unset_fake_temporarily():  # the buffers are real, and so must be their copies
        buffers = [
            (module, name, buffer, buffer if is_lazy(buffer) else buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device.index or 0 for device in devices]))
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(caching)
            with torch.no_grad(), unset_fake_temporarily():
                for module, name, buffer, copy in buffers:
                    module._buffers[name] = buffer
                    if buffer is not copy:
                        buffer.copy_(copy)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Undo what a traced forward does on the way: attributes it sets, random numbers it draws, warnings it gives."""
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    state = random.getstate()
    try:
        with warnings.catch_warnings(), state_kept(model, (), {}):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)
        for module, found in attributes:
            module.__dict__.clear()
            module.__dict__.update(found)
