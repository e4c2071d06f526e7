"""What takes less than a tensor: one bit for each value, one byte for each window of a max-pool, a shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_convbn.ops.recipes import Recipe, shape_of

# A boolean is a byte, 0 or 1, and eight of them are an int64. This product gathers their bits in its highest byte.
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101  # puts a byte into all eight
_PICK = 0x8040201008040201 - 2**64  # and leaves one bit in each: bit i in byte i
LARGEST_WINDOW = 256  # positions that a byte can tell apart


class PackedBits:
    """A boolean tensor, packed to one bit for each value. Its layout in memory is kept if it is dense.

    Args:
        mask: A boolean tensor of any shape.
    """

    __slots__ = ("_bits", "_order", "_shape")

    def __init__(self, mask: Tensor) -> None:
        self._order = _from_outer_to_inner(mask)
        ordered = mask.permute(self._order).contiguous()
        self._shape = ordered.shape
        flat = ordered.view(-1)
        if flat.numel() % 8:
            flat = F.pad(flat, (0, -flat.numel() % 8))
        self._bits = ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)

    def unpack(self) -> Tensor:
        """Return the boolean tensor."""
        eight = (self._bits.to(torch.int64) * _REPEAT).bitwise_and_(_PICK)
        flat = eight.view(torch.uint8) != 0
        ordered = flat[: self._shape.numel()].view(self._shape)
        return ordered.permute(_inverse(self._order))


class Window(NamedTuple):
    """The geometry of a max-pool, with one entry per spatial dimension in each tuple."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, dims: int, kernel: object, stride: object, padding: object, dilation: object) -> Window:
        """Build it from the arguments of a pool, which may be numbers or sequences; a missing stride is the kernel."""
        chosen = kernel if stride is None or stride == [] or stride == () else stride
        return cls(*(_per_dimension(value, dims) for value in (kernel, chosen, padding, dilation)))

    def reach(self, spatial: Sequence[int]) -> int:
        """How far the last value of a window is from the first one in a flat input of that size."""
        reach = 0
        for size, kernel, dilation in zip(spatial, self.kernel, self.dilation, strict=True):
            reach = reach * size + (kernel - 1) * dilation
        return reach

    @property
    def positions(self) -> int:
        """How many values a window has."""
        count = 1
        for size in self.kernel:
            count *= size
        return count


def recipe_of_indices(index: Tensor, spatial: Sequence[int], window: Window) -> Recipe:
    """Return the recipe of the indices of a max-pool. It keeps one byte for each window: where in it the largest is.

    Args:
        index: Flat indices into the spatial dimensions of the input, ``(..., *pooled)``, int64.
        spatial: Size of the spatial dimensions of the input.
        window: The geometry of the pool.

    The indices come back exactly.
    """
    pooled, spatial, device = index.shape[-len(spatial) :], tuple(spatial), index.device
    position, start = _positions(pooled, spatial, window, device)
    offset_at = torch.zeros(window.reach(spatial) + 1, dtype=torch.uint8, device=device)
    offset_at[position] = torch.arange(len(position), dtype=torch.uint8, device=device)
    packed = _looked_up(offset_at, index - start)

    def recipe() -> Tensor:
        position, start = _positions(pooled, spatial, window, device)
        return _looked_up(position, packed.int()).add_(start)

    return recipe


def _positions(
    pooled: Sequence[int], spatial: Sequence[int], window: Window, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the values of a window are in the flat input, relative to its start; and where each window starts."""
    position = torch.zeros(1, dtype=torch.int64, device=device)
    start = torch.zeros(1, dtype=torch.int64, device=device)
    for dim, size in enumerate(spatial):
        within = torch.arange(window.kernel[dim], device=device) * window.dilation[dim]
        first = torch.arange(pooled[dim], device=device) * window.stride[dim] - window.padding[dim]
        position, start = (position.unsqueeze(-1) * size + within).flatten(), start.unsqueeze(-1) * size + first
    return position, start[0]


def layout_of(tensor: Tensor, *, dense: bool = False) -> Recipe:
    """Return the recipe of a tensor that is saved for its shape and its layout in memory alone.

    Args:
        tensor: The tensor.
        dense: Whether it must have a place for each value: BatchNorm adds up the gradient of its bias in another order
            beside a tensor that has not.
    """
    if tensor.is_contiguous() and not dense:
        return shape_of(tensor)
    shape, strides, dtype, device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return lambda: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for a table of one dimension, several times faster. The layout in memory is the index's."""
    order = _from_outer_to_inner(index)
    ordered = index.permute(order)
    return table.index_select(0, ordered.reshape(-1)).view(ordered.shape).permute(_inverse(order))


def _from_outer_to_inner(tensor: Tensor) -> list[int]:
    """The dimensions in the order in which they lie in memory."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _per_dimension(value: object, dims: int) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(value) * dims if len(value) == 1 else tuple(value)
    return (value,) * dims  # type: ignore[return-value]
