"""Count what PyTorch computes, whatever functions a model calls for it."""

from __future__ import annotations

import gc
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class NewTensors(TorchDispatchMode):
    """Counts the results of some shapes that do not share their storage with an input.

    Attributes:
        shapes: The shapes; None for all.
        count: How many there have been.
    """

    def __init__(self, shapes: Collection[torch.Size] | None = None) -> None:
        super().__init__()
        self.shapes = shapes
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tensors((args, kwargs))}
        self.count += sum(
            leaf.untyped_storage()._cdata not in inputs and (self.shapes is None or leaf.shape in self.shapes)
            for leaf in tensors(result)
        )
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def count_alive(shape: torch.Size) -> int:
    """Count the storages of plain tensors and parameters of a shape that somebody holds."""
    gc.collect()
    # Not by isinstance, which would ask lazy modules for their class; and a FakeTensor has no address.
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and thing.shape == shape]
    return len({thing.data_ptr() for thing in found})
