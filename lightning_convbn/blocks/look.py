"""Looks at a block, to know if it can run twice, and if it draws random numbers.

A shadow of the block runs on tensors without data. So nothing of the model or of its inputs changes, nothing is
computed and no memory is taken. A table of classes could not tell as much: functions draw, too, and write.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_convbn.blocks import reasons
from lightning_convbn.compat import (
    FakeTensor,
    TorchDispatchMode,
    changes_input,
    fake_tensor_mode,
    storage_id,
    tree_leaves,
    tree_map_only,
    without_modes,
    without_torch_function,
)
from lightning_convbn.layers.norms import trains_statistics
from lightning_convbn.ops.convolution import is_distributed
from lightning_convbn.ops.repetition import IMMUTABLE
from lightning_convbn.pairs.shadow import Shadow
from lightning_convbn.pairs.side_effects import (
    OF_EVERY_MODULE,
    leaves_in_attributes,
    random_states,
    side_effects_undone,
)
from lightning_convbn.text import first_line

# Schedules of these start with a probability of 0, at which nothing is drawn.
_MAY_DRAW = re.compile(r"Drop|Stochastic")


class Look(NamedTuple):
    """What a look at a block has shown.

    Attributes:
        draws: Whether it may draw random numbers.
        reason: Why it can't run again; None if it can.
    """

    draws: bool = False
    reason: str | None = None


def look_at(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Look:
    """Look at a block that is about to run.

    Args:
        block: A block of a model in any mode.
        args: Positional arguments of its forward. Their tensors may have no data.
        kwargs: Keyword arguments of its forward.
    """
    may_draw = any(_MAY_DRAW.search(type(module).__name__) for module in block.modules())
    if any(module is not block and changes_input(module) for module in block.modules()):
        return Look(reason=reasons.HOOKED)
    if is_distributed() and any(isinstance(module, nn.SyncBatchNorm) and module.training for module in block.modules()):
        return Look(reason=reasons.SYNCHRONISED)
    if any(_is_generator(leaf) for module in block.modules() for leaf in tree_leaves(dict(vars(module)))):
        return Look(reason=reasons.DRAWS)
    try:
        watch, reason = _run_shadow(block, args, kwargs)
    except Exception as error:  # a user's forward may raise anything if a tensor has no data
        return Look(reason=reasons.NEEDS_DATA.format(error=f"{type(error).__name__}: {first_line(error)}"))
    return Look(may_draw or watch.draws, reason)


def _run_shadow(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[_Watch, str | None]:
    """Run a shadow without data, and without gradients: then it does not run anything again itself."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    fake = given[0].fake_mode if given else fake_tensor_mode()
    with without_modes(), torch.no_grad():
        shadow = Shadow(block).model
        args, kwargs = tree_map_only(Tensor, lambda tensor: _without_data(tensor, fake), (args, dict(kwargs)))
        for module in shadow.modules():
            _forget_data(module, fake)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with side_effects_undone(shadow, args, kwargs):
            before, watch = random_states(), _Watch()
            known = list(_held_by(shadow))
            once = {storage_id(buffer): name for name, buffer in _statistics_of(shadow)}  # written in the first run
            with fake, watch:
                shadow(*args, **kwargs)
            drawn = watch.draws_elsewhere or random_states() != before
    if any(storage_id(tensor) in watch.written for tensor in inputs):
        return watch, reasons.WRITES_INPUT
    twice = watch.written - {*once}
    written = (name for name, leaf in known if isinstance(leaf, Tensor) and storage_id(leaf) in twice)
    name = next(written, None) or _first_change(known, list(_held_by(shadow)))
    if name is not None:
        return watch, reasons.WRITES_STATE.format(name=name)
    name = next((once[storage] for storage in once if storage in watch.read), None)
    if name is not None:
        return watch, reasons.READS_STATISTICS.format(name=name)
    return watch, reasons.DRAWS if drawn else None


def _statistics_of(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of the BatchNorms in Train mode, with names: a second run does not write to them."""
    for name, module in block.named_modules():
        if trains_statistics(module):
            yield from module.named_buffers(name, recurse=False)


def _without_data(tensor: Tensor, fake: Any) -> Tensor:
    with without_torch_function():
        plain = tensor.detach()
        return plain if isinstance(plain, FakeTensor) else fake.from_tensor(plain)  # type: ignore[no-any-return]


def _forget_data(module: nn.Module, fake: Any) -> None:
    """Give a module buffers and attributes without data: of real ones, writes to views are not seen.

    A BatchNorm that averages the statistics of all batches reads how many there were, so it does not average here.
    """
    if trains_statistics(module) and getattr(module, "momentum", 0.0) is None:
        module.momentum = 0.0  # type: ignore[assignment]
    for name, tensor in module.named_buffers(recurse=False):
        setattr(module, name, _without_data(tensor, fake))
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            vars(module)[name] = tree_map_only(Tensor, lambda tensor: _without_data(tensor, fake), value)


def _is_generator(value: object) -> bool:
    """Whether something draws random numbers by a state of its own."""
    return isinstance(value, (random.Random, torch.Generator)) or type(value).__module__.startswith("numpy.random")


def _held_by(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield all that a model holds, with names: what a second run would write, replace or add to again."""
    yield from model.named_buffers()
    yield from model.named_parameters()
    yield from leaves_in_attributes(model)
    for module in model.modules():  # once more, because that names an object once, however often a list holds it
        for name, value in vars(module).items():
            if name not in OF_EVERY_MODULE:
                yield from ((name, leaf) for leaf in tree_leaves(value))


def _first_change(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> str | None:
    """Return the name of the first thing that is another one afterwards, or was added or removed; None if none was."""
    for (name, one), (other_name, other) in zip_longest(before, after, fillvalue=("", None)):
        same = one is other or (isinstance(one, IMMUTABLE) and type(one) is type(other) and one == other)
        if name != other_name or not same:
            return name or other_name
    return None


class _Watch(TorchDispatchMode):
    """Notes what operations write, and whether they draw random numbers.

    Attributes:
        draws: Whether any has drawn.
        draws_elsewhere: Whether any has drawn from a generator that it was given.
        written: The storages that were written.
        read: The storages that were read, other than to update them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws = self.draws_elsewhere = False
        self.written: set[int] = set()
        self.read: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        self.draws_elsewhere |= any(isinstance(value, torch.Generator) for value in named.values())
        trains = bool(named.get("training", named.get("train", "running_mean" in named)))
        for argument in func._schema.arguments:
            is_statistic = trains and argument.name in ("running_mean", "running_var")  # not declared as a write
            is_written = is_statistic or (argument.alias_info is not None and argument.alias_info.is_write)
            leaves = tree_leaves(named.get(argument.name))
            seen = self.written if is_written else self.read
            seen |= {storage_id(tensor) for tensor in leaves if isinstance(tensor, Tensor)}
        return func(*args, **kwargs)
