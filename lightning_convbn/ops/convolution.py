"""The one convolution of a pair: what Tune mode and Deploy mode run in the place of a convolution and its BatchNorm.

Tune mode folds in every forward pass and convolves once. All of it is plain operations. What autograd would save
without need is then replaced by recipes:

- the folded weight ``w'`` is computed again from the weight and the vector ``s``, which the gradient of the weight
  needs anyway;
- the input is replaced by its shape where neither the weight nor gamma wants a gradient, and so is the folded weight
  where the input wants none;
- an input that can itself be computed again (`recomputable.py`) is replaced by its recipe;

So a pair keeps its input and two values for each output channel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils.checkpoint import checkpoint

from lightning_convbn.compat import version_of, without_torch_function
from lightning_convbn.ops.autocast import autocast
from lightning_convbn.ops.fold import ConvSpec, Operands, fold_conv_bn, fold_steps, scaled
from lightning_convbn.ops.recipes import Recipe, Source, replace_saved_by_conv, shape_of, takes_recipes, unwritten
from lightning_convbn.ops.recomputable import Recomputable, recipe_of, step_aside_for_other_hooks, unmark

is_distributed: Callable[[], bool] = (
    torch.distributed.is_initialized if torch.distributed.is_available() else bool  # which is False
)


def conv_bn(input: Tensor, operands: Operands, spec: ConvSpec | None, lower: torch.dtype | None = None) -> Tensor:
    """Compute ``bn(conv(input))`` with frozen statistics as ONE convolution: Tune mode.

    Kept for the backward pass: the input, if the weight or gamma wants a gradient, and two values for each output
    channel. Under autocast the convolution runs in the autocast dtype, and the cast input is kept. Parameters get
    gradients of their own dtype.

    If a parameter or a running statistic is written before the backward pass, autograd raises an error, as in Eval
    mode; or, if it has kept what it needs of it, it goes by what the forward pass saw. In a distributed run it always
    does so for the statistics, which are copied: ``DistributedDataParallel`` may write them in every forward pass.

    Args:
        input: ``(N, C_in, *spatial)``, or ``(N, C_in)`` for a linear layer.
        operands: What is folded.
        spec: Geometry of the convolution; None for a linear layer.
        lower: The dtype of autocast; None if it is off.

    Returns:
        The normalised output, ``(N, C_out, *spatial)`` or ``(N, C_out)``.
    """
    if type(input) is not Tensor and isinstance(input, Recomputable):
        if not has_torch_function(operands[:-1]):
            with without_torch_function():
                step_aside_for_other_hooks(input)
                return _conv_bn(input, operands, spec, lower)
        unmark(input)  # another subclass of Tensor handles the functions from here on
    return _conv_bn(input, operands, spec, lower)


def conv_bn_in_graph(
    input: Tensor, operands: Operands, spec: ConvSpec | None, lower: torch.dtype | None = None
) -> Tensor:
    """Compute the same within a graph that is compiled, traced or exported. The arguments are those of `conv_bn`."""
    operand, dtype = autocast(input, operands.weight.dtype, lower)
    return convolve(operand, *_fold_in_graph(operands, spec, dtype), spec)


def folded_conv(input: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec | None) -> Tensor:
    """Run the convolution of a pair that was folded before: Deploy mode. The input is not kept.

    Args:
        input: ``(N, C_in, *spatial)``, or ``(N, C_in)`` for a linear layer, in the dtype of the weight.
        weight: Folded weight from `fold_conv_bn`, without gradient.
        bias: Folded bias ``(C_out,)``, without gradient.
        spec: Geometry of the convolution; None for a linear layer.
    """
    output = convolve(input, weight, bias, spec)
    if output.requires_grad and takes_recipes(output):
        replace_saved_by_conv(output, shape_of(input), None, spec)
    return output


def output_numel(input: Tensor, weight: Tensor, spec: ConvSpec | None) -> int:
    """How many values `convolve` would put out."""
    without_data = [torch.empty(tensor.shape, device="meta") for tensor in (input, weight)]
    return convolve(without_data[0], without_data[1], None, spec).numel()


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec | None) -> Tensor:
    """Convolve, or, without a geometry, apply a linear layer."""
    if spec is None:
        return F.linear(input, weight, bias)
    return torch.convolution(input, weight, bias, *spec)


def _conv_bn(input: Tensor, operands: Operands, spec: ConvSpec | None, lower: torch.dtype | None) -> Tensor:
    """Fold, convolve once, and leave recipes in the graph."""
    if is_distributed():
        mean, var = operands.running_mean.clone(), operands.running_var.clone()
        operands = operands._replace(running_mean=mean, running_var=var)
    weight = operands.weight
    operand, dtype = (input, weight.dtype) if lower is None else autocast(input, weight.dtype, lower)
    factor, shift, folded = fold_steps(operands, spec)
    if folded.dtype is not dtype:
        folded, shift = folded.to(dtype), shift.to(dtype)
    output = convolve(operand, folded, shift, spec)
    if not takes_recipes(output):
        return output

    # Only the gradient of the input reads the values of the folded weight, and the other way round.
    if not operand.requires_grad:
        weight_recipe = shape_of(folded)
    elif weight.requires_grad:
        weight_recipe = partial(_folded_again, weight, version_of(weight), factor, dtype)
    else:
        weight_recipe = _frozen_weight_recipe(operands, spec, dtype)
    input_recipe = None
    if not folded.requires_grad:
        input_recipe = shape_of(operand)
    elif type(input) is not Tensor:
        input_recipe = recipe_of(input, dtype)
    replace_saved_by_conv(output, input_recipe, weight_recipe, spec)
    return output


def _folded_again(weight: Tensor, version: int | None, factor: Tensor, dtype: torch.dtype, _: object) -> Tensor:
    """Compute a folded weight that is trained: its gradient needs ``factor``, so this is kept anyway."""
    folded = scaled(unwritten(weight, version), factor)
    return folded if folded.dtype is dtype else folded.to(dtype)


def _frozen_weight_recipe(operands: Operands, spec: ConvSpec | None, dtype: torch.dtype) -> Recipe:
    """Return the recipe of a folded weight that is not trained: of it nothing is kept."""
    sources = [None if operand is None else Source(operand) for operand in operands[:-1]]

    def recipe(_: object = None) -> Tensor:
        tensors = [None if source is None else source.value() for source in sources]
        return fold_conv_bn(Operands._make([*tensors, operands.eps]), spec, dtype)[0]

    return recipe


def _fold_in_graph(operands: Operands, spec: ConvSpec | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold within a graph that is compiled or exported.

    A compiler merges the fold of the backward pass with the forward's, and keeps the folded weight. It computes again
    what it is told to: activation checkpointing tells it.
    """

    def fold(*operands: Any) -> tuple[Tensor, Tensor]:
        return fold_conv_bn(Operands(*operands), spec, dtype)

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
