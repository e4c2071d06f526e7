"""The one convolution of a pair: what Tune mode and Deploy mode run in the place of a convolution and its BatchNorm.

Tune mode folds in every forward pass and convolves once. All of it is plain operations. What autograd would save
without need is then replaced by recipes:

- the folded weight ``w'`` and the vectors of the fold are computed again from the parameters and the running
  statistics;
- the input is replaced by its shape where neither the weight nor gamma wants a gradient, and so is the folded weight
  where the input wants none;
- an input that can itself be computed again (`recomputed_activations.py`) is replaced by its recipe.

So a pair keeps its input, and nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils.checkpoint import checkpoint

from lightning_convbn.compat import replace_saved, without_torch_function
from lightning_convbn.ops.fold import (
    ConvSpec,
    fold_conv_bn,
    fold_steps,
    layout,
)
from lightning_convbn.ops.recipes import FoldRecipes, recipe_of_center, replace_saved_by_conv, shape_of, takes_recipes
from lightning_convbn.ops.recomputed_activations import Recomputed, recipe_of, unmark


def conv_bn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    spec: ConvSpec | None,
) -> Tensor:
    """Compute ``bn(conv(input))`` with frozen statistics as ONE convolution: Tune mode.

    Kept for the backward pass: the input, if the weight or gamma wants a gradient, and nothing else. Under autocast the
    convolution runs in the autocast dtype, and the cast input is kept. Parameters get gradients of their own dtype.

    Parameters and running statistics must not be written before the backward pass. Autograd raises an error then, as
    in Eval mode. Only in a distributed run the statistics are copied, because ``DistributedDataParallel`` may write
    them in every forward pass. The backward pass then goes by what the forward pass saw.

    Args:
        input: ``(N, C_in, *spatial)``, or ``(N, C_in)`` for a linear layer.
        weight: Convolution or linear weight; shapes as in `fold.py`.
        bias: Convolution bias ``(C_out,)``, or None.
        gamma: BatchNorm scale ``(C_out,)``, or None.
        beta: BatchNorm shift ``(C_out,)``, or None.
        running_mean: Running mean ``(C_out,)``.
        running_var: Running variance ``(C_out,)``.
        eps: BatchNorm's epsilon.
        spec: Geometry of the convolution; None for a linear layer.

    Returns:
        The normalised output, ``(N, C_out, *spatial)`` or ``(N, C_out)``.
    """
    operands = (weight, bias, gamma, beta, running_mean, running_var)
    if torch.compiler.is_compiling():
        dtype = compute_dtype(input, weight)
        return convolve(cast(input, dtype), *_fold_in_graph(operands, eps, spec, dtype), spec)
    if isinstance(input, Recomputed):
        if not has_torch_function(operands):
            with without_torch_function():
                return _conv_bn(input, *operands, eps, spec)
        unmark(input)  # another subclass of Tensor handles the functions from here on
    return _conv_bn(input, *operands, eps, spec)


def folded_conv(input: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec | None) -> Tensor:
    """Run the convolution of a pair that was folded before: Deploy mode. The input is not kept.

    Args:
        input: ``(N, C_in, *spatial)``, or ``(N, C_in)`` for a linear layer.
        weight: Folded weight from `fold_conv_bn`, without gradient.
        bias: Folded bias ``(C_out,)``, without gradient.
        spec: Geometry of the convolution; None for a linear layer.
    """
    input = cast(input, weight.dtype)
    output = convolve(input, weight, bias, spec)
    if not torch.compiler.is_compiling() and takes_recipes(output):
        replace_saved_by_conv(output, shape_of(input), None, spec)
    return output


def compute_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that the convolution of ``input`` with ``weight`` runs in: autocast's where it applies."""
    if weight.dtype is not torch.float64 and _autocasting(input):
        return torch.get_autocast_dtype(input.device.type)
    return weight.dtype


def cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``input`` as autocast would. Without autocast a wrong dtype stays the caller's error."""
    return input.to(dtype) if input.dtype is not torch.float64 and _autocasting(input) else input


def _autocasting(input: Tensor) -> bool:
    device = input.device.type
    # PyTorch 2.9 can't compile the question whether a device has autocast; the devices that compile have it.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec | None) -> Tensor:
    """Convolve, or, without a geometry, apply a linear layer."""
    if spec is None:
        return F.linear(input, weight, bias)
    return torch.convolution(input, weight, bias, *spec)


def _conv_bn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    spec: ConvSpec | None,
) -> Tensor:
    """Fold, convolve once, and leave recipes in the graph."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        running_mean, running_var = running_mean.clone(), running_var.clone()
    dtype = compute_dtype(input, weight)
    operand = cast(input, dtype)
    center, scale, shift, folded = fold_steps(weight, bias, gamma, beta, running_mean, running_var, eps, layout(spec))
    folded_weight = folded.to(dtype)
    output = convolve(operand, folded_weight, shift.to(dtype), spec)

    if takes_recipes(output):
        recipes = FoldRecipes(weight, gamma, running_var, eps, spec, dtype)
        if scale.requires_grad:
            replace_saved(scale.grad_fn, "other", recipes.rstd)
        if weight.requires_grad:
            replace_saved(folded.grad_fn, "other", recipes.scale_per_channel)
        if shift.requires_grad and center is not running_mean:
            replace_saved(shift.grad_fn, "tensor1", recipe_of_center(running_mean, bias, center.dtype))
            replace_saved(shift.grad_fn, "tensor2", recipes.scale)
        # Only the gradient of the input reads the values of the folded weight, and the other way round.
        weight_recipe = recipes.weight if operand.requires_grad else shape_of(folded_weight)
        input_recipe = shape_of(operand) if not folded.requires_grad else recipe_of(input) if operand is input else None
        replace_saved_by_conv(output, input_recipe, weight_recipe, spec)
    return output


def _fold_in_graph(
    operands: tuple[Any, ...], eps: float, spec: ConvSpec | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Fold within a graph that is compiled or exported.

    A compiler merges the fold of the backward pass with the forward's, and keeps the folded weight. It computes again
    what it is told to: activation checkpointing tells it.
    """
    transposed, groups = layout(spec)
    fold: Any = partial(fold_conv_bn, transposed=transposed, groups=groups, dtype=dtype)
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return fold(*operands, eps)
    folded: Tensor
    folded, shift = checkpoint(fold, *operands, eps, use_reentrant=False, preserve_rng_state=False)
    if folded.device.type == "cpu" and folded.dim() == 4 and folded.shape[1] == 1 and folded.is_contiguous():
        # Inductor lays all else out as channels last. oneDNN goes by strides, and those of a depthwise weight fit both
        # layouts: taken for the other one, its backward pass takes half as long again.
        height, width = folded.shape[2:]
        folded = folded.as_strided(folded.shape, (height * width, 1, width, 1))
    return folded, shift
