"""Copies a model, in any mode and with any wrapper, to its plain modules in eval state."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_convbn.compat import compiled_by_lightning, watches_input, watches_output
from lightning_convbn.layers.supported_layers import is_scripted_norm
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.find import find_conv_bn_pairs, pairs_in_force
from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs
from lightning_convbn.pairs.side_effects import leaves_in_attributes

# These wrappers change how a model runs, but not what it computes. Each has one child: the model.
WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel")


@dataclass(frozen=True)
class PlainCopy:
    """A copy of a model in eval state, without conversion and wrappers.

    Attributes:
        model: The copy.
        names: Qualified name of a module in the original -> its name in the copy.
        in_force: The pairs that the original was converted with, by their names in the copy. None for a plain original.
    """

    model: nn.Module
    names: Mapping[str, str]
    in_force: ConvBNPairs | None

    def renamed(self, pairs: ConvBNPairs) -> ConvBNPairs:
        """Return pairs of the original by their names in the copy."""
        return _renamed(pairs, self.names)

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Load weights into the copy. ``state`` has the names of the original."""
        split = {key: key.rpartition(".") for key in state}
        parents = {key: self.names.get(parent, parent) for key, (parent, _, _) in split.items()}
        renamed = {f"{parents[key]}.{split[key][2]}".lstrip("."): value for key, value in state.items()}
        self.model.load_state_dict(renamed, strict=strict)

    def find_pairs(self, example_inputs: Sequence[Any] | None = None) -> ConvBNPairs:
        """Find the pairs of the copy in its eval state. If the original was converted, only those in force there.

        In a copy a fold is for good: no mark makes it right at run time. So a pair must be proven with gradients and
        without, because a forward may ask whether they are wanted. A recording runs without.
        """
        with torch.enable_grad():
            pairs = find_conv_bn_pairs(self.model, example_inputs=example_inputs)
        if example_inputs is None:
            with torch.no_grad():
                without = find_conv_bn_pairs(self.model)
            others = [pair for pair in pairs if pair not in without]
            reason_of = {pair.bn: reasons.GRADIENTS_ASKED.format(conv=pair.conv) for pair in others}
            pairs = pairs.unfuse({**reason_of, **without.unpaired})
        if self.in_force is None:
            return pairs
        return pairs.unfold({pair.bn: reasons.NOT_GIVEN for pair in pairs if pair not in self.in_force})

    def without_hooked(self, pairs: ConvBNPairs) -> ConvBNPairs:
        """Return pairs without those whose hooks would see other values in the copy, or would be lost."""

        def is_hooked(pair: ConvBNPair) -> bool:
            norm = self.model.get_submodule(pair.bn).modules()
            seen_by_norm = any(watches_input(module) or watches_output(module) for module in norm)
            return seen_by_norm or watches_output(self.model.get_submodule(pair.conv))

        return pairs.unfold({pair.bn: reasons.HOOKED for pair in pairs if is_hooked(pair)})


def plain_copy(model: nn.Module) -> PlainCopy:
    """Copy a model, in any mode and with any wrapper, to its plain modules in eval state.

    Raises:
        ValueError: If the model is no module, or if a BatchNorm is TorchScript, or if it is sharded.
    """
    check_copyable(model)
    # deepcopy takes from `copies` what it would otherwise copy itself. It can't copy a tensor with a graph, which a
    # forward may have left in an attribute. So the values are copied.
    copies: dict[int, Any] = {
        id(leaf): leaf.detach().clone()
        for _, leaf in leaves_in_attributes(model)
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    }
    compiled = {name: found for name, module in model.named_modules() if (found := compiled_by_lightning(module))}
    copies |= {id(found): None for found in compiled.values()}
    copied = _deep_copy(model, copies)
    for name, methods in compiled.items():
        for original in methods:
            copied.get_submodule(name).__dict__.pop(original.removeprefix("original_"), None)
    in_copy = {id(module): name for name, module in copied.named_modules()}
    names = {
        name: in_copy[id(copies[id(module)])]
        for name, module in model.named_modules()
        if id(copies.get(id(module))) in in_copy
    }
    in_force = pairs_in_force(model)
    return PlainCopy(copied.eval(), names, None if in_force is None else _renamed(in_force, names))


def check_copyable(model: nn.Module) -> None:
    """Raise a ValueError if a model is no module, or if a BatchNorm is TorchScript, or if it is sharded."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"model: `{name or type(module).__name__}`"
        if is_scripted_norm(module):
            raise ValueError(
                f"{where} is a BatchNorm in TorchScript, whose code can't be changed; give the model before scripting"
            )
        tensors = {type(parameter).__name__ for parameter in module.parameters(recurse=False)}
        if type(module).__name__ == "FullyShardedDataParallel" or tensors & {"DTensor", "FlatParameter"}:
            raise ValueError(
                f"{where} is sharded over processes; give a plain model with weights from a consolidated checkpoint"
            )


def _deep_copy(model: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """Copy a model without its wrappers. ``copies`` is the memo of ``copy.deepcopy``: id of an original -> its copy."""
    try:
        for module in reversed([*model.modules()]):  # inner wrappers first
            inside = _wrapped_by(module)
            if inside is not None:
                copies[id(module)] = copy.deepcopy(inside, copies)
        copied: nn.Module = copy.deepcopy(model, copies)
    except TypeError as error:  # a lock, a file or a generator in an attribute
        raise ValueError(
            f"model: {type(model).__name__} can't be copied: {error}; remove the attribute that can't be copied"
        ) from error
    return copied


def _wrapped_by(module: nn.Module) -> nn.Module | None:
    """Return the model inside a wrapper, or None if the module is no wrapper."""
    if type(module).__name__ in WRAPPERS:
        return next(module.children())
    for package in ("lightning.fabric", "lightning_fabric"):
        fabric = sys.modules.get(package)  # this folder works without Lightning, so it does not import it
        if fabric is not None and fabric.is_wrapped(module):
            return cast(nn.Module, module.module)
    return None


def _renamed(pairs: ConvBNPairs, names: Mapping[str, str]) -> ConvBNPairs:
    def new(name: str) -> str:
        return names.get(name, name)

    return ConvBNPairs(
        [ConvBNPair(new(pair.conv), new(pair.bn)) for pair in pairs],
        {new(bn): reason for bn, reason in pairs.unpaired.items()},
        map(new, pairs.unfrozen),
        map(new, pairs.untraced),
        {new(bn): reason for bn, reason in pairs.unfused.items()},
    )
