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

from typing import Any, NamedTuple

import torch
from torch import Tensor

Operands = tuple[Any, Any, Any, Any, Any, Any, float]  # what is folded: the first seven arguments of `fold_conv_bn`


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
    _, _, shift, folded = fold_steps(weight, bias, gamma, beta, running_mean, running_var, eps, (transposed, groups))
    return cast(folded, dtype or weight.dtype), cast(shift, dtype or weight.dtype)


def fold_steps(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    layout: tuple[bool, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the equations of the module's docstring, in the dtype of the fold.

    The arguments are those of `fold_conv_bn`, and the layout of the weight, from the function `layout`. Returned are
    ``s``; the same, shaped for the weight; ``b'``; and ``w'``.

    Autograd saves ``r`` and ``s``, and nothing else but parameters and buffers: ``b'`` is a sum of products with ``s``.
    """
    rstd = reciprocal_std(running_var, eps, fold_dtype(weight))
    scale = rstd if gamma is None else gamma * rstd
    shift = torch.addcmul(torch.zeros_like(rstd) if beta is None else beta, running_mean, scale, value=-1)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    factor = per_channel(scale, weight, layout)
    return scale, factor, shift, scaled(weight, factor)


def reciprocal_std(running_var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``r`` of the equations, ``(C_out,)``, in ``dtype``."""
    return (cast(running_var, dtype) + eps).rsqrt()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor. Most have the dtype already, and a call of ``to`` takes half as long as a product."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def per_channel(scale: Tensor, weight: Tensor, layout: tuple[bool, int]) -> Tensor:
    """Shape ``scale`` ``(C_out,)`` for `scaled`."""
    transposed, groups = layout
    kernel = [1] * (weight.dim() - 2)
    if not transposed:
        return scale.view(-1, 1, *kernel)
    return scale.view(1, -1, *kernel) if groups == 1 else scale.view(groups, 1, -1, *kernel)


def scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """``w'`` of the equations: each output channel of the weight times its entry in ``factor``, from `per_channel`.

    Only a transposed weight with groups has a factor of more dimensions, the first of them for the groups.
    """
    if weight.dim() == factor.dim():
        return weight * factor
    return (weight.unflatten(0, (factor.shape[0], -1)) * factor).flatten(0, 1)
