"""Putting back what a forward pass moves beside its output, and finding the tensors in what it leaves behind."""

from __future__ import annotations

import random
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_convbn.layers.swap import LINKS


@contextmanager
def state_kept(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Put back random states, buffers and attributes of the modules: a forward pass may move any of them.

    Autocast's cache is off meanwhile: a weight that it casts without gradients, or as a FakeTensor, would stay in use.
    So is ``torch.compile``: what watches the pass can't be compiled, and the pass should cost nobody a recompilation.
    """
    tensors = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in (*tensors, *model.parameters()) if tensor.device.type == "cuda"}
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    with unset_fake_temporarily():  # the buffers are real, and so must be their copies
        buffers = [
            (module, name, buffer, buffer if buffer.is_meta or is_lazy(buffer) else buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device.index or 0 for device in devices]))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"]
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            for module, found in attributes:
                module.__dict__.clear()
                module.__dict__.update(found)
            with torch.no_grad(), unset_fake_temporarily():
                for module, name, buffer, copy in buffers:
                    module._buffers[name] = buffer
                    # A write would be in the way of a backward pass that is still to come, so only where values differ.
                    if buffer is not copy and not torch.equal(buffer, copy):
                        buffer.copy_(copy)


@contextmanager
def traced_quietly(model: nn.Module) -> Iterator[None]:
    """Keep the state of a model, and to ourselves what warnings its forward gives to proxies."""
    with warnings.catch_warnings(), state_kept(model, (), {}):
        warnings.simplefilter("ignore")
        yield


def leaves_of(value: Any) -> Iterator[Any]:
    """Walk through containers and through objects of any class, down to tensors, proxies and what has no parts."""
    seen: dict[int, Any] = {}  # holds the items, so that no id is used twice
    rest = deque([value])
    while rest:
        item = rest.popleft()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        parts = _items(item)
        if len(parts) == 1 and parts[0] is item:
            parts = [] if isinstance(item, _WHOLE) else _parts_of_object(item)
            if not parts:
                yield item
        rest += parts


_WHOLE = (Tensor, nn.Module, type, torch.fx.Proxy)


def _items(container: Any) -> list[Any]:
    """The items of a container, or the object itself; not the items' items, for a container may hold itself."""
    is_leaf = chain([False], repeat(True))
    return tree_flatten(container, is_leaf=lambda _: next(is_leaf))[0]


def _parts_of_object(item: Any) -> list[Any]:
    if isinstance(item, (set, frozenset)):
        return list(item)
    slots = getattr(type(item), "__slots__", ())
    slots = slots if isinstance(slots, tuple) else ()
    return [*getattr(item, "__dict__", {}).values(), *(getattr(item, slot) for slot in slots if hasattr(item, slot))]


def stashed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name what the modules hold in attributes of their own, as a forward may leave it there."""
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name not in _OF_TORCH and not name.endswith("_hooks"):
                for leaf in leaves_of(value):
                    yield name, leaf


_OF_TORCH = {"_parameters", "_buffers", "_modules", "_swap", *LINKS, "_trainer", "_fabric"}
