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
        strides = mask.stride()
        self._order = sorted(range(mask.dim()), key=lambda dim: (-strides[dim], dim))
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
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        return ordered.permute(back)


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

    Source: prototype `relu_max_pool.py`; the indices come back exactly.
    """
    dims = len(spatial)
    offset, rest = torch.zeros_like(index), index
    scale = 1
    for dim in reversed(range(dims)):
        position = rest % spatial[dim] - _starts(index, dim - dims, window, dim)
        offset = offset + position.div_(window.dilation[dim], rounding_mode="floor").mul_(scale)
        rest = rest.div(spatial[dim], rounding_mode="floor")
        scale *= window.kernel[dim]
    packed = offset.to(torch.uint8)

    def recipe() -> Tensor:
        offset, index = packed.long(), torch.zeros_like(packed, dtype=torch.int64)
        scale = 1
        for dim in reversed(range(dims)):
            position = offset % window.kernel[dim] * window.dilation[dim] + _starts(offset, dim - dims, window, dim)
            index = index.add_(position.mul_(scale))
            offset = offset.div(window.kernel[dim], rounding_mode="floor")
            scale *= spatial[dim]
        return index

    return recipe


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


def _starts(like: Tensor, dim: int, window: Window, index: int) -> Tensor:
    """Where each window begins in one dimension, shaped to go with the pooled tensor. It may be in the padding."""
    count = like.shape[dim]
    starts = torch.arange(count, device=like.device) * window.stride[index] - window.padding[index]
    return starts.view(count, *(1,) * (-dim - 1))


def _per_dimension(value: object, dims: int) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(value) * dims if len(value) == 1 else tuple(value)
    return (value,) * dims  # type: ignore[return-value]
