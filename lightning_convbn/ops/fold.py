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


class ConvSpec(NamedTuple):
    """What a convolution needs beside its tensors, with one entry per spatial dimension in each tuple."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def layout(spec: ConvSpec | None) -> tuple[bool, int]:
    """Where a weight has its output channels: whether it is transposed, and its groups. None is a linear layer."""
    return (spec.transposed, spec.groups) if spec else (False, 1)


def fold_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to fold in: at least float32, because folding in half precision adds 20 to 40 % to the error."""
    return torch.promote_types(torch.float32, weight.dtype)


def fold_conv_bn(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    transposed: bool = False,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Fold frozen BatchNorm statistics and affine parameters into a convolution's weight and bias.

    Args:
        weight: Convolution or linear weight; shapes as in the module's docstring.
        bias: Convolution bias ``(C_out,)``, or None for zero.
        gamma: BatchNorm scale ``(C_out,)``, or None for one.
        beta: BatchNorm shift ``(C_out,)``, or None for zero.
        running_mean: Running mean ``(C_out,)``.
        running_var: Running variance ``(C_out,)``.
        eps: BatchNorm's epsilon.
        transposed: Whether ``weight`` has the layout of a transposed convolution.
        groups: The convolution's groups; they matter for a transposed weight only.
        dtype: Dtype of the results; None for ``weight.dtype``. The fold itself runs in float32 or above.

    Returns:
        The folded weight, shaped as ``weight``, and the folded bias ``(C_out,)``, by differentiable operations.
    """
    steps = fold_steps(weight, bias, gamma, beta, running_mean, running_var, eps, (transposed, groups))
    return steps.weight.to(dtype or weight.dtype), steps.shift.to(dtype or weight.dtype)


class FoldSteps(NamedTuple):
    """What the fold computes on its way, in the dtype of the fold.

    Attributes:
        center: ``mu - b``, ``(C_out,)``.
        scale: ``s``, ``(C_out,)``.
        shift: ``b'``, ``(C_out,)``.
        weight: ``w'``, shaped as the weight.
    """

    center: Tensor
    scale: Tensor
    shift: Tensor
    weight: Tensor


def fold_steps(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    layout: tuple[bool, int],
) -> FoldSteps:
    """Compute the equations of the module's docstring. ``layout`` is the weight's, from the function `layout`."""
    rstd = reciprocal_std(running_var, eps, fold_dtype(weight))
    center = center_of(running_mean, bias, rstd.dtype)
    scale = rstd if gamma is None else gamma * rstd
    start = torch.zeros_like(rstd) if beta is None else beta.to(rstd.dtype)
    shift = torch.addcmul(start, center, scale, value=-1)
    return FoldSteps(center, scale, shift, weight * per_channel(scale, weight, *layout))


def reciprocal_std(running_var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``r`` of the equations, ``(C_out,)``, in ``dtype``."""
    return (running_var.to(dtype) + eps).rsqrt()


def center_of(running_mean: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``mu - b`` of the equations, ``(C_out,)``, in ``dtype``: what the convolution without a bias is shifted by."""
    return running_mean.to(dtype) if bias is None else running_mean.to(dtype) - bias


def per_channel(scale: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """Shape ``scale`` ``(C_out,)`` so that its product with ``weight`` scales each output channel."""
    kernel = [1] * (weight.dim() - 2)
    if not transposed:
        return scale.view(-1, 1, *kernel)
    if groups == 1:
        return scale.view(1, -1, *kernel)
    inputs_per_group = weight.shape[0] // groups
    return scale.view(groups, 1, -1).expand(-1, inputs_per_group, -1).reshape(weight.shape[0], -1, *kernel)
