"""One forward of a pair: the convolution runs folded and puts out a mark, and the BatchNorm takes it off.

What each of the two does is here, from top to bottom. The arithmetic is in `ops/convolution.py`, the mark in
`marks.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_convbn.compat import (
    in_graph,
    inside_transform,
    is_in_backward,
    is_watched,
    pack_hook,
    tensors_of_pair,
    version_of,
    versions_in_call,
    versions_of,
    versions_of_affine,
    without_torch_function,
)
from lightning_convbn.layers.calls import Call
from lightning_convbn.layers.marks import Mark, mark, taken_off, unmarked
from lightning_convbn.layers.norms import EPSILON, affine_of, frozen_forward, run_after
from lightning_convbn.layers.state import Pair, pair_of
from lightning_convbn.ops.autocast import autocast, autocast_dtype, dtype_of_autocast
from lightning_convbn.ops.convolution import conv_bn, conv_bn_in_graph, folded_conv, output_numel
from lightning_convbn.ops.fold import ConvSpec, Operands, fold_conv_bn
from lightning_convbn.ops.recomputable import follow, is_foreign


def conv_forward(self: nn.Module, input: Tensor, output_size: Any = None) -> Tensor:
    """Return a mark that stands for the normalised output; or the plain output, where the pair can't be folded."""
    pair = pair_of(self)
    if type(input) is not Tensor and isinstance(input, Mark):
        input = unmarked(input)
    arguments = () if output_size is None else (output_size,)
    if pair is None:
        return type(self).forward(self, input, *arguments)  # type: ignore[no-any-return]
    if in_graph():
        return _conv_in_graph(pair, input, arguments)
    if _runs_plainly(pair):
        return type(self).forward(self, input, *arguments)  # type: ignore[no-any-return]
    marked = None
    if type(input) is Tensor:
        marked = _marked(pair, input, output_size)
    elif not is_foreign(type(input)):
        with without_torch_function():  # a recomputable input has functions of its own for what is asked
            marked = _marked(pair, input, output_size)
    return type(self).forward(self, input, *arguments) if marked is None else marked  # type: ignore[no-any-return]


def _runs_plainly(pair: Pair) -> bool:
    """Whether the two layers run as they are: somebody sees what passes between them, or has changed what one computes.

    A forward pass that runs again in the backward pass, as under a checkpoint, decides as it did in the forward pass.
    """
    conv, bn = pair.conv, pair.bn
    watched = is_watched(conv, bn) or "_conv_forward" in vars(conv)
    watched = watched or (type(conv).forward, type(bn).forward) != pair.forwards
    if watched is not pair.watched:
        if is_in_backward():
            return pair.watched
        pair.watched = watched
    return watched


def norm_forward(self: nn.Module, input: Tensor) -> Tensor:
    """Return the folded output behind the mark of the convolution. Anything else is normalised."""
    pair = pair_of(self)
    if pair is None:
        return frozen_forward(self, input)  # type: ignore[no-any-return]
    if isinstance(input, Mark):
        folded = None if torch.compiler.is_compiling() else taken_off(input, pair)
        if folded is not None:
            return _finished(pair, input, folded)
        input = unmarked(input)
    elif in_graph():
        folded = _norm_in_graph(pair, input)
        if folded is not None:
            return run_after(self, pair.norm_row, folded)
    if pair.check is not None:
        pair.check.note_plain(pair)
    return frozen_forward(self, input)  # type: ignore[no-any-return]


def _marked(pair: Pair, input: Tensor, output_size: Any) -> Tensor | None:
    """Run the folded pair and mark its output; return None if the plain layers do it better, or must."""
    if input.dim() != pair.dims:
        return None
    conv, bn = pair.conv, pair.bn
    weight, bias, gamma, beta, mean, var = tensors_of_pair(conv, bn)
    if mean is None or var is None:
        return None
    input, spec = pair.geometry(conv, input, output_size)
    operands = Operands(weight, bias, gamma, beta, mean, var, getattr(bn, "eps", EPSILON))
    if not weight.requires_grad and _eval_keeps_less(input, operands, spec):
        return None
    versions, lower = versions_in_call(input, weight, bias), autocast_dtype(input)
    affine_versions = versions_of_affine(gamma, beta, mean, var)
    if pair.mode == "deploy":
        output = _deployed(pair, input, operands, spec, lower)
    else:
        output = conv_bn(input, operands, spec, lower)
    with_grad = torch.is_grad_enabled()
    return mark(Call(pair, input, operands, spec, versions, affine_versions, pack_hook(), with_grad, lower, output))


def _finished(pair: Pair, marked: Any, folded: Tensor) -> Tensor:
    """What the BatchNorm makes of the folded output."""
    if pair.check is not None:
        folded = pair.check.compare(pair, marked, folded)
    if pair.recompute != "none":
        folded = follow(folded, frozen=not marked.call.is_trained())
    return run_after(pair.bn, pair.norm_row, folded) if pair.norm_row.runs_after else folded


def _eval_keeps_less(input: Tensor, operands: Operands, spec: ConvSpec | None) -> bool:
    """Whether Eval mode keeps the output, and a fold would keep a larger input: if only gamma is trained."""
    weight, gamma = operands.weight, operands.gamma
    only_gamma_is_trained = not weight.requires_grad and gamma is not None and gamma.requires_grad
    return only_gamma_is_trained and output_numel(input, weight, spec) < input.numel()


class Fold(NamedTuple):
    """A fold that Deploy mode keeps."""

    weight: Tensor
    bias: Tensor
    key: tuple[Any, ...]  # identity, version and address of each source, and all else that the fold depends on
    sources: tuple[Tensor, ...]  # they hold their storages: an address in the key is not used a second time


def _deployed(
    pair: Pair, input: Tensor, operands: Operands, spec: ConvSpec | None, lower: torch.dtype | None
) -> Tensor:
    """Deploy mode: convolve with a fold that is kept, or as in Tune mode where gradients or a graph would miss it.

    The fold is made anew after a write that PyTorch counts: an optimizer's step, ``load_state_dict``, a move to another
    device. A write that it does not count is noticed at the next switch: through ``.data``, by numpy, or by another
    BatchNorm in Train mode that has the same buffers. In evaluations of a Trainer no fold is kept.
    """
    sources = tuple(operand for operand in operands if isinstance(operand, Tensor))
    trained = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    without_data = any(type(source) not in (Tensor, nn.Parameter) or source.is_meta for source in (input, *sources))
    if trained or without_data or not pair.keeps_fold or not pair.owns_weight or inside_transform():
        pair.fold = None
        return conv_bn(input, operands, spec, lower)
    operand, dtype = autocast(input, operands.weight.dtype, lower)
    versions = versions_of(sources)
    key = (dtype, operands.eps, *map(id, operands[:-1]), versions)
    fold: Fold | None = pair.fold  # several threads may run the model, so it is read once
    if fold is None or fold.key != key or versions is None:
        with torch.inference_mode(False), torch.no_grad():
            folded = fold_conv_bn(operands, spec, dtype)
        fold = Fold(*folded, key, tuple(source.detach() for source in sources))
        pair.fold = fold if type(fold.weight) is Tensor else None  # a FakeTensorMode may be active
    return folded_conv(operand, fold.weight, fold.bias, spec)


# ------------------------------------------------------------------------------------------------------- in a graph
# In a graph of a compiler or of a trace there are no marks. The convolution puts out the plain output, and an attribute
# of it says what it was made of. The BatchNorm of the pair runs the folded convolution on that. Nobody reads the plain
# output then, so the compiler drops it. Whoever else reads it gets what Eval would have given; a graph may also end
# between the two layers, or hold one of them alone. Dynamo does not tell of a write in place: there it is not noticed.

_MADE_OF = "_convbn_made_of"


class MadeOf(NamedTuple):
    """What a plain output was made of, within a graph."""

    pair: Pair
    input: Tensor
    arguments: tuple[Any, ...]
    version: int | None  # of the output; None in a graph of Dynamo, which does not know it


def _conv_in_graph(pair: Pair, input: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Return the plain output, and note on it what it was made of."""
    output: Tensor = type(pair.conv).forward(pair.conv, input, *arguments)
    if not _runs_plainly(pair):
        setattr(output, _MADE_OF, MadeOf(pair, input, arguments, _version_in_graph(output)))
    return output


def _norm_in_graph(pair: Pair, input: Tensor) -> Tensor | None:
    """Return the folded output for a plain one; None if that is not the pair's, was written, or is not to be folded."""
    made_of: MadeOf | None = getattr(input, _MADE_OF, None)
    if (
        made_of is None
        or made_of.pair is not pair
        or made_of.version != _version_in_graph(input)
        or pair.mode == "eval"
    ):
        return None
    conv, affine = pair.conv, affine_of(pair.bn)
    if affine.running_mean is None or affine.running_var is None or made_of.input.dim() != pair.dims:
        return None
    padded, spec = pair.geometry(conv, made_of.input, *(made_of.arguments or (None,)))
    operands = Operands(conv.weight, conv.bias, *affine)  # type: ignore[arg-type]
    if _eval_keeps_less(padded, operands, spec):
        return None
    return conv_bn_in_graph(padded, operands, spec, dtype_of_autocast(padded.device.type))


def _version_in_graph(tensor: Tensor) -> int | None:
    return None if torch.compiler.is_dynamo_compiling() else version_of(tensor)
