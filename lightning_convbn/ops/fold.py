r"""The fold: a frozen BatchNorm moves into the weight and bias of the convolution in front of it.

A BatchNorm whose statistics are frozen is an affine map per channel. So for every output channel :math:`c`

.. math::

    w'_c = s_c\, w_c, \qquad
    b'_c = (b_c - \mu_c)\, s_c + \beta_c, \qquad
    s_c = \gamma_c\, r_c, \qquad
    r_c = \frac{1}{\sqrt{\sigma^2_c + \varepsilon}}

give ``conv(x, w', b') == bn(conv(x, w, b))``. Autograd differentiates these equations as they stand. With
:math:`G = \partial J / \partial w'` and :math:`g = \partial J / \partial b'` it finds

.. math::

    \frac{\partial J}{\partial w_c} = s_c\, G_c, \quad
    \frac{\partial J}{\partial b_c} = s_c\, g_c, \quad
    \frac{\partial J}{\partial \gamma_c} = r_c \bigl(\langle G_c, w_c \rangle + g_c (b_c - \mu_c)\bigr), \quad
    \frac{\partial J}{\partial \beta_c} = g_c .

Shapes: ``b``, ``mu``, ``sigma^2``, ``gamma``, ``beta`` are ``(C_out,)``; ``w`` is ``(C_out, C_in / groups, *k)`` for a
convolution, ``(C_in, C_out / groups, *k)`` for a transposed one and ``(C_out, C_in)`` for a linear layer.

Source: You et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", ICLR 2024, arXiv 2305.11624, section 3.
The paper's Tune mode lets autograd save every :math:`w'`. Here the graph keeps a recipe in its place (`recipes.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """What is folded: the tensors of a convolution, or linear layer, and of its BatchNorm.

    Attributes:
        weight: Convolution or linear weight; shapes as in the module's docstring.
        bias: Its bias ``(C_out,)``, or None for zero.
        gamma: BatchNorm scale ``(C_out,)``, or None for one.
        beta: BatchNorm shift ``(C_out,)``, or None for zero.
        running_mean: Running mean ``(C_out,)``.
        running_var: Running variance ``(C_out,)``.
        eps: BatchNorm's epsilon.
    """

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float


class Affine(NamedTuple):
    """What is folded of a frozen BatchNorm: the last five of the `Operands`, by its own names."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float


class ConvSpec(NamedTuple):
    """What a convolution needs beside its tensors, with one entry per spatial dimension in each tuple."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def fold_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to fold in: at least float32, because folding in half precision adds 20 to 40 % to the error."""
    dtype = weight.dtype
    return dtype if dtype is torch.float32 else torch.promote_types(torch.float32, dtype)


def fold_conv_bn(
    operands: Operands, spec: ConvSpec | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Fold frozen BatchNorm statistics and affine parameters into a convolution's weight and bias.

    Args:
        operands: What is folded.
        spec: Geometry of the convolution: a transposed one has its output channels elsewhere. None is a linear layer.
        dtype: Dtype of the results; None for that of the weight. The fold itself runs in float32 or above.

    Returns:
        The folded weight, shaped as the weight, and the folded bias ``(C_out,)``, by differentiable operations.
    """
    _, shift, folded = fold_steps(operands, spec)
    dtype = dtype or operands.weight.dtype
    return folded.to(dtype), shift.to(dtype)


def fold_steps(operands: Operands, spec: ConvSpec | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the equations of the module's docstring, in the dtype of the fold.

    Returned are ``s``, shaped for the weight; ``b'``; and ``w'``. The arguments are those of `fold_conv_bn`.

    Autograd saves ``r`` and ``s``, and nothing else but parameters and buffers: ``b'`` is a sum of products with ``s``.
    """
    weight, bias, gamma, beta, mean, var, eps = operands
    dtype = fold_dtype(weight)
    rstd = ((var if var.dtype is dtype else var.to(dtype)) + eps).rsqrt()
    scale = rstd if gamma is None else gamma * rstd
    shift = torch.addcmul(torch.zeros_like(rstd) if beta is None else beta, mean, scale, value=-1)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    factor = per_channel(scale, weight, spec)
    return factor, shift, scaled(weight, factor)


def per_channel(scale: Tensor, weight: Tensor, spec: ConvSpec | None) -> Tensor:
    """Shape ``scale`` ``(C_out,)`` for `scaled`."""
    if spec is None or not spec.transposed:
        return scale.view(_FIRST[weight.dim()])
    kernel = _FIRST[weight.dim()][2:]
    return scale.view(1, -1, *kernel) if spec.groups == 1 else scale.view(spec.groups, 1, -1, *kernel)


_FIRST = {dims: (-1, *[1] * (dims - 1)) for dims in range(2, 6)}  # one value for each index of dim 0


def scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """``w'`` of the equations: each output channel of the weight times its entry in ``factor``, from `per_channel`.

    Only a transposed weight with groups has a factor of more dimensions, the first of them for the groups.
    """
    if weight.dim() == factor.dim():
        return weight * factor
    return (weight.unflatten(0, (factor.shape[0], -1)) * factor).flatten(0, 1)
