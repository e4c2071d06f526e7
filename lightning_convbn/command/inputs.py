"""What a forward is called with: `Inputs` has the shapes of all arguments, says them as text, and makes the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.option_values import dtype_name
from lightning_convbn.compat import tree_leaves, tree_map, tree_map_only
from lightning_convbn.text import first_line

EXAMPLE = "example_input_array"  # Lightning's name
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the positional and the keyword arguments of a forward


@dataclass(frozen=True)
class TensorInput:
    """A tensor that a forward gets.

    Attributes:
        shape: Its shape.
        dtype: Its dtype. None is the dtype of the model.
        values: The values of an example. Without them, floats are random, and all others are 0: a valid index.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    values: Tensor | None = None

    def make(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
        """Make the tensor. What is no example shares the memory of its first sample, so a large batch takes no more."""
        dtype = self.dtype or dtype
        if self.values is not None and self.values.shape == self.shape:
            return self.values.to(device, dtype)
        if self.values is not None:
            first = self.values[:1]
        elif dtype.is_floating_point:
            first = torch.randn(1, *self.shape[1:], generator=generator)
        else:
            first = torch.zeros(1, *self.shape[1:])
        return first.to(device, dtype).expand(self.shape)

    def __str__(self) -> str:
        """Return the text that ``--input`` has for it, such as ``8x16:int64``."""
        shape = "x".join(map(str, self.shape)) or "scalar"
        return shape if self.dtype is None else f"{shape}:{dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward, as `TensorInput` in lists, tuples and dicts.

    The batch is the first dimension of a tensor. A list has one entry for each sample, as torchvision's detectors take
    it. All arguments must have the same batch to have one; tuples and dicts have that of their entries.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        source: Where they come from, if not from options.

    Example:
        >>> inputs = Inputs((TensorInput((8, 3, 32, 32)),), {"tokens": TensorInput((8, 5), torch.int64)})
        >>> print(inputs, inputs.batch)
        8x3x32x32 tokens=8x5:int64 8
        >>> print(inputs.with_batch(2))
        2x3x32x32 tokens=2x5:int64
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def batch(self) -> int | None:
        """The batch. None if the arguments have no batch in common."""
        sizes = set(self._batches().values())
        return sizes.pop() if len(sizes) == 1 else None

    def check_batch(self, option: str) -> None:
        """Raise a `CommandError` that names ``option``, if the arguments have no batch in common."""
        if self.batch is None:
            sizes = ", ".join(f"{name} {size}" for name, size in self._batches().items()) or "no tensor"
            raise CommandError(
                f"{option} needs inputs of one batch, which is the first size of a tensor and the number of entries of "
                f"a list; they have {sizes}: give all the same, or leave out {option.partition(' ')[0]}"
            )

    def with_batch(self, batch: int) -> Inputs:
        """Return inputs of the same samples in another batch. They must have a batch."""

        def resized(node: Any) -> Any:
            if isinstance(node, list):
                return [node[index % len(node)] for index in range(batch)] if node else node
            if isinstance(node, TensorInput) and node.shape:
                return TensorInput((batch, *node.shape[1:]), node.dtype, node.values)
            return node

        args, kwargs = tree_map(resized, (self.args, self.kwargs), is_leaf=lambda node: isinstance(node, list))
        return Inputs(args, kwargs, self.source)

    def make(self, dtype: torch.dtype, device: torch.device, *, dense: bool = False) -> Call:
        """Make the tensors, the same at each call.

        Args:
            dtype: That of floats whose dtype was not given.
            device: The device of all.
            dense: Whether each sample has memory of its own, as a forward may need that views its input or writes it.

        Raises:
            CommandError: If a tensor can't be made.
        """
        generator = torch.Generator().manual_seed(0)

        def made(leaf: TensorInput) -> Tensor:
            tensor = leaf.make(dtype, device, generator)
            return tensor.contiguous() if dense else tensor

        try:
            call: Call = tree_map_only(TensorInput, made, (self.args, dict(self.kwargs)))
        except (RuntimeError, TypeError, OverflowError) as error:
            raise CommandError(f"the input {self} can't be made: {first_line(error)}; give a smaller one") from error
        return call

    def has_lists(self) -> bool:
        """Whether an argument is a list, or holds one: its entries are the samples of the batch."""
        nodes = tree_leaves((self.args, dict(self.kwargs)), is_leaf=lambda node: isinstance(node, list))
        return any(isinstance(node, list) for node in nodes)

    def as_dict(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return everything in types that JSON has."""

        def plain(node: Any) -> Any:
            if isinstance(node, TensorInput):
                return {"shape": list(node.shape), "dtype": dtype_name(node.dtype or dtype)}
            if isinstance(node, Mapping):
                return {str(key): plain(value) for key, value in node.items()}
            return [plain(value) for value in node] if isinstance(node, (list, tuple)) else str(node)

        return {"args": plain(self.args), "kwargs": plain(self.kwargs), "source": self.source or None}

    def __str__(self) -> str:
        """Return the texts that ``--input`` has for the arguments."""
        texts = [_text(node) for node in self.args]
        texts += [f"{name}={_text(node)}" for key, value in self.kwargs.items() for name, node in _entries(key, value)]
        return " ".join(texts) + (f" ({self.source})" if self.source else "")

    def _batches(self) -> dict[str, int]:
        """Return the batch of each argument, by name."""
        named = {f"input {number}": node for number, node in enumerate(self.args, 1)} | dict(self.kwargs)
        return {name: size for key, value in named.items() for name, size in _batches(key, value)}


def example_inputs(model: nn.Module) -> Inputs | None:
    """Return the ``example_input_array`` of a LightningModule. As for Lightning, a dict is keyword arguments."""
    example = getattr(model, EXAMPLE, None)
    if example is None:
        return None
    tree = tree_map_only(Tensor, _of_example, example)
    if isinstance(tree, dict):
        return Inputs(kwargs=tree, source=EXAMPLE)
    return Inputs(tuple(tree) if isinstance(tree, (list, tuple)) else (tree,), source=EXAMPLE)


def _of_example(tensor: Tensor) -> TensorInput:
    return TensorInput(tuple(tensor.shape), None if tensor.is_floating_point() else tensor.dtype, tensor.detach())


def _entries(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    """List what lies in dicts, by dotted names."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _entries(f"{name}.{key}", value)
    else:
        yield name, node


def _batches(name: str, node: Any) -> Iterator[tuple[str, int]]:
    for full_name, entry in _entries(name, node):
        if isinstance(entry, list) and entry:
            yield full_name, len(entry)
        elif isinstance(entry, tuple):
            for index, value in enumerate(entry):
                yield from _batches(f"{full_name}[{index}]", value)
        elif isinstance(entry, TensorInput) and entry.shape:
            yield full_name, entry.shape[0]


def _text(node: Any) -> str:
    if isinstance(node, Mapping):
        return f"{{{','.join(f'{key}={_text(value)}' for key, value in node.items())}}}"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return f"({','.join(map(_text, node))})" if isinstance(node, tuple) else str(node)
