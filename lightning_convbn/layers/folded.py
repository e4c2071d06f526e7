"""One forward of a pair: the convolution runs folded and puts out a mark, and the BatchNorm takes it off.

What each of the two does is here, from top to bottom. The arithmetic is in `ops/convolution.py`, the mark in
`marks.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_convbn.compat import (
    FakeTensor,
    in_graph,
    inside_transform,
    is_in_backward,
    is_watched,
    pack_hook,
    tensors_of_pair,
    versions_in_call,
    versions_of,
    versions_of_affine,
    without_torch_function,
)
from lightning_convbn.layers.calls import Call, names_of
from lightning_convbn.layers.marks import Mark, mark, mark_plain, taken_off, unmarked
from lightning_convbn.layers.norms import EPSILON, frozen_forward, normalised, run_after
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
        return _in_graph(pair, input, arguments)
    if _runs_plainly(pair):
        return type(self).forward(self, input, *arguments)  # type: ignore[no-any-return]
    marked = None
    if type(input) is Tensor:
        marked = _marked(pair, input, output_size)
    elif not is_foreign(type(input)):
        with without_torch_function():  # a recomputable input has functions of its own for what is asked
            marked = _marked(pair, input, output_size)
    return mark_plain(type(self).forward(self, input, *arguments), pair) if marked is None else marked


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
    elif _is_normalised(pair, input):
        return run_after(self, pair.norm_row, input)
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
    versions, affine_versions = versions_in_call(input, weight, bias), versions_of_affine(gamma, beta, mean, var)
    lower = autocast_dtype(input)
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
# In a graph of a compiler or of a trace there are no marks: the convolution returns the folded output, and its
# BatchNorm returns what it gets. That is right if both do so. But one of the two may be in a graph, and the other one
# not: if it was compiled alone, or if a graph ends between the two. So it is decided once, when a graph is first made
# of one of the two, and all graphs go by that. Equal layers share a graph, so each run of a graph notes it anew.
#
# - The convolution comes first: the pair is folded in graphs. If its BatchNorm then gets a tensor without a mark
#   outside of a graph, nobody knows if that is normalised already, and an error says so.
# - The BatchNorm comes first, so it was compiled without its convolution: in graphs the pair runs plainly.


def _in_graph(pair: Pair, input: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Return the folded output, if graphs fold the pair, and else the plain output."""
    conv, bn = pair.conv, pair.bn
    mean, var = bn.running_mean, bn.running_var
    if pair.plain_in_graphs or _runs_plainly(pair) or mean is None or var is None:
        return type(conv).forward(conv, input, *arguments)  # type: ignore[no-any-return]
    if torch.compiler.is_exporting():
        pair.note_export()
    else:
        pair.folded_in_graphs = True
    weight: Any = conv.weight
    eps = getattr(bn, "eps", EPSILON)
    operands = Operands(weight, conv.bias, bn.weight, bn.bias, mean, var, eps)  # type: ignore[arg-type]
    if input.dim() == pair.dims:
        padded, spec = pair.geometry(conv, input, *(arguments or (None,)))
        if not _eval_keeps_less(padded, operands, spec):
            return conv_bn_in_graph(padded, operands, spec, dtype_of_autocast(input.device.type))
    plain: Tensor = type(conv).forward(conv, input, *arguments)
    return normalised(bn, plain)


def _is_normalised(pair: Any, input: Tensor) -> bool:
    """Whether what a BatchNorm gets is normalised already, although it has no mark: in a graph, by the proof.

    Raises:
        RuntimeError: If it may be, and nobody knows: outside of a graph, while the pair is folded in graphs.
    """
    if pair.mode == "eval":
        return False
    if in_graph():
        if pair.folded_in_graphs and not _runs_plainly(pair) and pair.bn.running_mean is not None:
            return True
        pair.plain_in_graphs = True
        return False
    if pair.folded_in_graphs and not _runs_plainly(pair) and type(input) in (Tensor, FakeTensor):
        raise RuntimeError(
            f"{names_of(pair)} in a graph (torch.compile). Outside of a graph the BatchNorm got a tensor that does not "
            "come from the convolution directly. If the graph ends between the two, the tensor is normalised already; "
            "else it is not. Compile a block that holds both layers, before the switch; or leave this pair out: "
            "set_mode(model, mode, pairs=...)"
        )
    return False
