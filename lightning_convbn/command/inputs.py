"""What a forward is called with, from the text of ``--input``, from a user's function, or from the model's example."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.model_argument import build, import_attribute
from lightning_convbn.compat import tree_leaves, tree_map, tree_map_only
from lightning_convbn.text import first_line

EXAMPLE = "example_input_array"  # Lightning's name
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the positional and the keyword arguments of a forward


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a dtype.

    Example:
        >>> dtype_name(torch.float32)
        'float32'
    """
    return str(dtype).removeprefix("torch.")


_NUMBER = r"[1-9]\d*"
_SHAPE = rf"{_NUMBER}(?:x{_NUMBER})*"
_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)}


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward.

    The batch is the first size of every tensor. A list has an entry for each sample, as torchvision's detectors take
    it. A tensor of a batch may share the memory of one sample, so that a large batch takes no more than a small one.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        source: Where they come from, if not from shapes.

    Example:
        >>> inputs = merged([parse_input("8x3x32x32"), parse_input("tokens=8x5:int64")])
        >>> print(inputs, inputs.batch)
        8x3x32x32 tokens=8x5:int64 8
        >>> print(inputs.with_batch(2))
        2x3x32x32 tokens=2x5:int64
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def batch(self) -> int | None:
        """The batch. None if the arguments have no batch in common."""
        leaves = tree_leaves((self.args, self.kwargs), is_leaf=_is_list)
        sizes = {len(leaf) for leaf in leaves if isinstance(leaf, list) or (isinstance(leaf, Tensor) and leaf.dim())}
        return sizes.pop() if len(sizes) == 1 else None

    def check_batch(self, option: str) -> None:
        """Raise a `CommandError` that names ``option``, if the arguments have no batch in common."""
        if self.batch is None:
            raise CommandError(
                f"{option} needs inputs of one batch, which is the first size of a tensor and the number of entries of "
                f"a list; they are {self}: give all the same batch, or leave out {option.partition(' ')[0]}"
            )

    def with_batch(self, batch: int) -> Inputs:
        """Return inputs of another batch: a tensor repeats its first sample, and a list its entries."""

        def resized(node: Any) -> Any:
            if isinstance(node, list) and node:
                return [node[index % len(node)] for index in range(batch)]
            if isinstance(node, Tensor) and node.dim() and len(node) != batch:
                return node[:1].expand(batch, *node.shape[1:])
            return node

        args, kwargs = tree_map(resized, (self.args, self.kwargs), is_leaf=_is_list)
        return replace(self, args=args, kwargs=kwargs)

    def to(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Return these inputs on a device. Floats get the dtype."""

        def moved(tensor: Tensor) -> Tensor:
            shares = tensor.dim() > 0 and tensor.stride(0) == 0
            own = tensor.detach()[:1] if shares else tensor.detach()
            return own.to(device, dtype if own.is_floating_point() else own.dtype).expand(tensor.shape)

        args, kwargs = tree_map_only(Tensor, moved, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def call(self, *, writable: bool = False) -> Call:
        """Return the arguments in containers of their own.

        Args:
            writable: Whether a forward may write to the tensors, or view them: each sample then has its own memory.
        """

        def own(tensor: Tensor) -> Tensor:
            return tensor.clone(memory_format=torch.contiguous_format) if writable else tensor

        call: Call = tree_map_only(Tensor, own, (self.args, self.kwargs))
        return call

    def has_lists(self) -> bool:
        """Whether an argument is a list, or holds one."""
        return any(map(_is_list, tree_leaves((self.args, self.kwargs), is_leaf=_is_list)))

    def as_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON has."""

        def plain(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return {"shape": list(leaf.shape), "dtype": dtype_name(leaf.dtype)}
            return leaf if isinstance(leaf, (bool, int, float, str)) else str(leaf)

        args, kwargs = tree_map(plain, (list(self.args), self.kwargs))
        return {"args": args, "kwargs": kwargs, "source": self.source or None}

    def __str__(self) -> str:
        """Return the texts that ``--input`` has for tensors, and similar ones for containers."""
        texts = [*map(_text, self.args), *(f"{name}={_text(value)}" for name, value in self.kwargs.items())]
        return " ".join(texts) + (f" ({self.source})" if self.source else "")


def parse_input(text: str) -> Inputs:
    """Return the argument that a value of ``--input`` gives, or those that its function returns."""
    match = re.fullmatch(rf"(?:([^\W\d]\w*)=)?({_SHAPE})(?::(\w+))?", text)
    if match is None:
        if re.fullmatch(r"[^\W\d][\w.]*:[\w.]+", text) is None:
            raise CommandError(
                f"--input {text!r} is no shape, as 8x3 or tokens=8x16:int64, and no package.module:function"
            )
        return _of_example(build(text, import_attribute(text)), text)
    name, shape, dtype = match.groups()
    if dtype and dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise CommandError(f"--input {text!r}: the dtype must be one of {known}; floats get that of the model")
    try:
        tensor = _tensor(tuple(map(int, shape.split("x"))), _DTYPES.get(dtype))
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CommandError(f"--input {text!r} can't be made: {first_line(error)}; give a smaller one") from error
    return Inputs(kwargs={name: tensor}) if name else Inputs((tensor,))


def merged(inputs: Sequence[Inputs]) -> Inputs:
    """Return the arguments of all in one."""
    args = tuple(arg for one in inputs for arg in one.args)
    kwargs = {name: value for one in inputs for name, value in one.kwargs.items()}
    return Inputs(args, kwargs, " ".join(filter(None, (one.source for one in inputs))))


def images(batch: int, sample: tuple[int, ...]) -> Inputs:
    """Return a batch of random samples."""
    return Inputs((_tensor((batch, *sample)),))


def sample_shape(size: str) -> tuple[int, ...]:
    """Return the shape of one sample, without the batch, from ``--size``.

    Example:
        >>> sample_shape("224"), sample_shape("1x28x28")
        ((3, 224, 224), (1, 28, 28))
    """
    if not re.fullmatch(_SHAPE, size):
        raise CommandError(f"--size {size!r} is no number of pixels, as 224, and no shape without batch, as 1x28x28")
    sizes = tuple(map(int, size.split("x")))
    return (3, *sizes, *sizes) if len(sizes) == 1 else sizes


def example_inputs(model: nn.Module) -> Inputs | None:
    """Return the ``example_input_array`` of a LightningModule."""
    example = getattr(model, EXAMPLE, None)
    return None if example is None else _of_example(example, EXAMPLE)


def _of_example(example: Any, source: str) -> Inputs:
    """Return an example as Lightning reads it: a tuple or list of positional arguments, or a dict of keyword ones."""
    if isinstance(example, Mapping):
        return Inputs((), dict(example), source)
    return Inputs(tuple(example) if isinstance(example, (list, tuple)) else (example,), {}, source)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    first = (1, *shape[1:])
    sample = torch.randn(first, generator=generator) if dtype is None else torch.zeros(first, dtype=dtype)
    return sample.expand(shape)


def _is_list(node: Any) -> bool:
    return isinstance(node, list)


def _text(node: Any) -> str:
    if isinstance(node, Tensor):
        dtype = "" if node.is_floating_point() else f":{dtype_name(node.dtype)}"
        return ("x".join(map(str, node.shape)) or "scalar") + dtype
    return str(tree_map_only(Tensor, _text, node)).replace("'", "")
