"""The one convolution of a pair: what Tune mode and Deploy mode run in the place of a convolution and its BatchNorm.

Tune mode folds in every forward pass and convolves once. All of it is plain operations. What autograd would save
without need is then replaced by recipes:

- the folded weight ``w'`` is computed again from the weight and the vector ``s``, which the gradient of the weight
  needs anyway;
- the input is replaced by its shape where neither the weight nor gamma wants a gradient, and so is the folded weight
  where the input wants none;
- an input that can itself be computed again (`recomputable.py`) is replaced by its recipe;
- the vector ``r`` is computed again where input or output are so small that it would count.

So a pair keeps its input and one value for each output channel, or two beside a large input and output.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils.checkpoint import checkpoint

from lightning_convbn.compat import replace_saved, version_of, without_torch_function
from lightning_convbn.ops.autocast import autocast_dtype
from lightning_convbn.ops.fold import ConvSpec, cast, fold_conv_bn, fold_steps, layout, reciprocal_std, scaled
from lightning_convbn.ops.recipes import Recipe, Source, replace_saved_by_conv, shape_of, takes_recipes, unwritten
from lightning_convbn.ops.recomputable import Recomputable, recipe_of, step_aside_for_other_hooks, unmark

HAS_DISTRIBUTED = torch.distributed.is_available()
LARGE = 64  # values for each channel: beside them, one more for each channel does not count


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

    Kept for the backward pass: the input, if the weight or gamma wants a gradient, and one value for each output
    channel, or two if input and output have at least ``LARGE`` for each. Under autocast the convolution runs in the
    autocast dtype, and the cast input is kept. Parameters get gradients of their own dtype.

    If a parameter or a running statistic is written before the backward pass, autograd raises an error, as in Eval
    mode; or, if it has kept what it needs of it, it goes by what the forward pass saw. In a distributed run it always
    does so for the statistics, which are copied: ``DistributedDataParallel`` may write them in every forward pass.

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
    operands = (weight, bias, gamma, beta, running_mean, running_var, eps)
    if torch.compiler.is_compiling():
        operand, dtype = autocast(input, weight.dtype)
        return convolve(operand, *_fold_in_graph(operands, spec, dtype), spec)
    if not isinstance(input, Recomputable):
        return _conv_bn(input, *operands, spec)
    if has_torch_function(operands):
        unmark(input)  # another subclass of Tensor handles the functions from here on
        return _conv_bn(input, *operands, spec)
    with without_torch_function():
        step_aside_for_other_hooks(input)
        return _conv_bn(input, *operands, spec)


def folded_conv(input: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec | None) -> Tensor:
    """Run the convolution of a pair that was folded before: Deploy mode. The input is not kept.

    Args:
        input: ``(N, C_in, *spatial)``, or ``(N, C_in)`` for a linear layer.
        weight: Folded weight from `fold_conv_bn`, without gradient.
        bias: Folded bias ``(C_out,)``, without gradient.
        spec: Geometry of the convolution; None for a linear layer.
    """
    input, _ = autocast(input, weight.dtype)
    with without_torch_function() if isinstance(input, Recomputable) else nullcontext():
        output = convolve(input, weight, bias, spec)
    if not torch.compiler.is_compiling() and takes_recipes(output):
        replace_saved_by_conv(output, shape_of(input), None, spec)
    return output


def autocast(input: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
    """Return the input, cast if autocast is on, and the dtype that a convolution runs in.

    As in autocast, float64 stays float64. Without autocast a wrong dtype stays the caller's error.
    """
    lower, double = autocast_dtype(input.device.type), torch.float64
    if lower is None:
        return input, weight_dtype
    return input if input.dtype is double else input.to(lower), weight_dtype if weight_dtype is double else lower


def output_numel(input: Tensor, weight: Tensor, spec: ConvSpec | None) -> int:
    """How many values `convolve` would put out."""
    without_data = [torch.empty(tensor.shape, device="meta") for tensor in (input, weight)]
    return convolve(without_data[0], without_data[1], None, spec).numel()


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
    if HAS_DISTRIBUTED and torch.distributed.is_initialized():
        running_mean, running_var = running_mean.clone(), running_var.clone()
    operand, dtype = autocast(input, weight.dtype)
    operands = (weight, bias, gamma, beta, running_mean, running_var)
    scale, factor, shift, folded = fold_steps(*operands, eps, layout(spec))
    folded_weight = cast(folded, dtype)
    output = convolve(operand, folded_weight, cast(shift, dtype), spec)

    if takes_recipes(output):
        trained = weight.requires_grad
        if scale.requires_grad and (not trained or min(operand.numel(), output.numel()) < LARGE * scale.numel()):
            replace_saved(scale.grad_fn, "other", _rstd_recipe(running_var, eps, scale.dtype))
        # Only the gradient of the input reads the values of the folded weight, and the other way round.
        if not operand.requires_grad:
            weight_recipe = shape_of(folded_weight)
        elif trained:
            weight_recipe = _weight_recipe(weight, factor, dtype)
        else:
            weight_recipe = _frozen_weight_recipe(operands, eps, layout(spec), dtype)
        input_recipe = recipe_of(input, dtype) if folded.requires_grad else shape_of(operand)
        replace_saved_by_conv(output, input_recipe, weight_recipe, spec)
    return output


def _rstd_recipe(running_var: Tensor, eps: float, dtype: torch.dtype) -> Recipe:
    version = version_of(running_var)
    return lambda: reciprocal_std(unwritten(running_var, version), eps, dtype)


def _weight_recipe(weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Recipe:
    """Return the recipe of a folded weight that is trained: its gradient needs ``factor``, so this is kept anyway."""
    version = version_of(weight)
    return lambda: cast(scaled(unwritten(weight, version), factor), dtype)


def _frozen_weight_recipe(
    operands: tuple[Any, ...], eps: float, layout: tuple[bool, int], dtype: torch.dtype
) -> Recipe:
    """Return the recipe of a folded weight that is not trained: of it nothing is kept."""
    transposed, groups = layout
    fold: Any = partial(fold_conv_bn, eps=eps, transposed=transposed, groups=groups, dtype=dtype)
    sources = [None if operand is None else Source(operand) for operand in operands]
    return lambda: fold(*(None if source is None else source.value() for source in sources))[0]


def _fold_in_graph(operands: tuple[Any, ...], spec: ConvSpec | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold within a graph that is compiled or exported.

    A compiler merges the fold of the backward pass with the forward's, and keeps the folded weight. It computes again
    what it is told to: activation checkpointing tells it.
    """
    transposed, groups = layout(spec)
    fold: Any = partial(fold_conv_bn, transposed=transposed, groups=groups, dtype=dtype)
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return fold(*operands)
    folded: Tensor
    folded, shift = checkpoint(fold, *operands, use_reentrant=False, preserve_rng_state=False)
    if folded.device.type == "cpu" and folded.dim() == 4 and folded.shape[1] == 1 and folded.is_contiguous():
        # Inductor lays all else out as channels last. oneDNN goes by strides, and those of a depthwise weight fit both
        # layouts: taken for the other one, its backward pass takes half as long again.
        height, width = folded.shape[2:]
        folded = folded.as_strided(folded.shape, (height * width, 1, width, 1))
    return folded, shift
