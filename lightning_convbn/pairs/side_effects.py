"""Side effects of a forward pass: how to undo them, and how to find the tensors that it leaves in attributes."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from lightning_convbn.compat import without_global_hooks


@contextmanager
def side_effects_undone(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Undo what a forward pass does outside of the model: random states are put back.

    What it does to the model itself is no matter: a `Shadow` of it runs, or a copy. Hooks of all modules are not
    called: they see real passes alone. The cache of autocast is emptied before and after. Else a weight that is cast
    here, without gradients or without data, would be used again in the next training step. ``torch.compile`` is
    switched off: the hooks and modes that watch a pass can't be compiled, and each would cause a recompilation.

    Args:
        model: The module that runs.
        inputs: Positional arguments of its forward. They tell which devices draw random numbers.
        kwargs: Keyword arguments of its forward.
    """
    devices = {
        tensor.device for tensor in (*tensors_of((inputs, kwargs)), *model.parameters()) if tensor.device.type == "cuda"
    }
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device.index or 0 for device in devices]))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"]
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(without_global_hooks())
        stack.callback(torch.clear_autocast_cache)
        torch.clear_autocast_cache()
        yield


@contextmanager
def reentrant_checkpoints_reported(report: Callable[..., None]) -> Iterator[None]:
    """Call ``report`` with the arguments of each ``checkpoint(..., use_reentrant=True)``: no fold goes over its border.

    It is an ``autograd.Function``, which no torch function mode and no trace sees.
    """
    apply = CheckpointFunction.apply

    def reported(*args: Any) -> Any:
        report(*args)
        return apply(*args)

    with mock.patch.object(CheckpointFunction, "apply", reported):
        yield


def random_states() -> tuple[Any, ...]:
    """The states of the random numbers that a forward may draw, to compare. Those of devices are not among them."""
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()[1:3]
    return random.getstate(), torch.get_rng_state().tolist(), *((drawn[0].tolist(), drawn[1]) if drawn else ())


def tensors_of(value: Any) -> list[Tensor]:
    """List the tensors among the leaves of a value: also those in objects that PyTorch's pytrees don't look into."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def leaves_of(value: Any) -> Iterator[Any]:
    """Walk through containers and through objects of any class, and yield all that has no parts.

    Tensors, neural and Python modules, classes, functions and proxies of ``torch.fx`` count as one part. Each object is
    visited once, so a container may hold itself. Only what is stored is visited: nothing that a subclass of ``dict``
    would load when it is asked, as those of transformers do. (PyTorch's own pytrees only look into containers of
    registered classes.)
    """
    seen: dict[int, Any] = {}  # it holds the objects: the id of one that is freed could be given to another
    rest = deque([value])
    while rest:
        item = rest.popleft()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        parts = [] if isinstance(item, _WHOLE) else _parts_of(item)
        if not parts:
            yield item
        rest += parts


_CONTAINERS = (list, tuple, set, frozenset, deque)
_WHOLE = (Tensor, nn.Module, type, ModuleType, FunctionType, torch.fx.Proxy)


def _parts_of(item: Any) -> list[Any]:
    """List the items of a container, and the attributes of any object."""
    container = next((cls for cls in _CONTAINERS if isinstance(item, cls)), None)
    items = dict.values(item) if isinstance(item, dict) else container.__iter__(item) if container else ()
    slots = getattr(type(item), "__slots__", ())
    slots = slots if isinstance(slots, tuple) else ()
    attributes = getattr(item, "__dict__", {}).values()
    return [*items, *attributes, *(getattr(item, slot) for slot in slots if hasattr(item, slot))]


def leaves_in_attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what the modules hold in attributes of their own, with the attribute's name.

    A forward pass may leave a tensor there, and somebody may read it later.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in OF_EVERY_MODULE and not is_trainer(value):
                for leaf in leaves_of(value):
                    yield name, leaf


def is_trainer(value: object) -> bool:
    """Whether a LightningModule holds its Trainer or its Fabric there: the search would go through all of it."""
    return any(cls.__name__ in ("Trainer", "Fabric") for cls in type(value).__mro__)


OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # where PyTorch itself holds parameters, buffers, children and hooks
