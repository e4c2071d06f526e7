"""Geometries of convolutions: the input with what must be padded beforehand, and what ``torch.convolution`` needs.

Each function takes a convolution, its input ``(N, C_in, *spatial)``, and the ``output_size`` of a transposed one. The
attributes of the convolution are read in each call: a user may change them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_convbn.compat import without_torch_function
from lightning_convbn.ops.fold import ConvSpec
from lightning_convbn.ops.recomputable import Recomputable, run

Geometry = Callable[[Any, Tensor, "Sequence[int] | None"], "tuple[Tensor, ConvSpec | None]"]


def of_conv(conv: Any, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
    """Pad where ``torch.convolution`` can't: other modes than zeros, and an uneven ``padding="same"``."""
    padding = conv.padding
    if conv.padding_mode != "zeros" or type(padding) is str:
        input, padding = _padded(input, conv)
    return input, _spec(conv, padding, False, conv.output_padding)


def _spec(conv: Any, padding: Any, transposed: bool, output_padding: Any) -> ConvSpec:
    """Put the geometry together. A user may have set a number or a list, which ``F.conv2d`` takes, too."""
    stride, dilation = conv.stride, conv.dilation
    if not type(stride) is type(padding) is type(dilation) is type(output_padding) is tuple:
        dims = conv.weight.dim() - 2
        stride, padding, dilation, output_padding = (
            (value,) * dims if isinstance(value, int) else tuple(value)
            for value in (stride, padding, dilation, output_padding)
        )
    return ConvSpec(stride, padding, dilation, transposed, output_padding, conv.groups)


def _padded(input: Tensor, conv: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Pad the input by what the convolution can't pad itself; return it and the padding that is left to do."""
    sides = [(size, size) for size in conv.padding] if not isinstance(conv.padding, str) else _sides(conv)
    zeros = conv.padding_mode == "zeros"
    padding = tuple(min(pair) if zeros else 0 for pair in sides)  # the convolution's own, equal on both sides
    rest = [size - own for pair, own in zip(reversed(sides), reversed(padding), strict=True) for size in pair]
    if any(rest) or not zeros:  # also with nothing to pad: it changes the layout in memory, as the plain layer does
        input = _pad(input, rest, "constant" if zeros else conv.padding_mode)
    return input, padding


def _pad(input: Tensor, sides: list[int], mode: str) -> Tensor:
    """Pad. If the input is recomputable, so is what comes out."""
    if not isinstance(input, Recomputable):
        return F.pad(input, sides, mode)
    with without_torch_function():
        return run(F.pad, (input, sides, mode), {})  # type: ignore[no-any-return]


def _sides(conv: Any) -> list[tuple[int, int]]:
    """Padding before and after, for each dimension, of ``padding="valid"`` or ``"same"``."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    totals = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def of_transposed(conv: Any, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
    """Turn ``output_size`` into the output padding.

    Raises:
        ValueError: If the convolution can't give an output of that size.
    """
    extra: tuple[int, ...] = conv.output_padding
    if output_size is not None:
        sizes = list(output_size)[-len(conv.stride) :]
        smallest = [
            (size - 1) * stride - 2 * before + dilation * (kernel - 1) + 1
            for size, stride, before, dilation, kernel in zip(
                input.shape[2:], conv.stride, conv.padding, conv.dilation, conv.kernel_size, strict=True
            )
        ]
        extra = tuple(size - least for size, least in zip(sizes, smallest, strict=True))
        if not all(0 <= more < stride for more, stride in zip(extra, conv.stride, strict=True)):
            largest = [least + stride - 1 for least, stride in zip(smallest, conv.stride, strict=True)]
            raise ValueError(
                f"requested an output size of {sizes}, but valid sizes range from {smallest} to {largest} (for an "
                f"input of {list(input.shape[2:])})"
            )
    return input, _spec(conv, conv.padding, True, extra)


def of_linear(conv: Any, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
    """A linear layer has no geometry."""
    return input, None


def of_same(conv: Any, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
    """TensorFlow's SAME padding, by the size of the input: an output has ``ceil(size / stride)`` elements.

    So pad ``Conv2dSame`` and ``Conv2dDynamicSamePadding`` of timm and others. What is uneven goes to the end.
    """
    padding: list[int] = []
    sizes = zip(input.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    for size, kernel, stride, dilation in reversed(list(sizes)):
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        padding += [total // 2, total - total // 2]
    if any(padding):
        input = _pad(input, padding, "constant")
    zeros = (0,) * len(conv.stride)
    return input, _spec(conv, zeros, False, zeros)


def of_static_same(conv: Any, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
    """SAME padding for a size known beforehand, by the child ``static_padding``: ``Conv2dStaticSamePadding``."""
    return of_conv(conv, conv.static_padding(input), output_size)
