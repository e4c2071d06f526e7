"""What the classes of folded convolutions are made of: Tune folds in every forward pass, Deploy once; geometries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convbn.compat import inside_transform, read, version_of, without_torch_function
from lightning_convbn.layers.calls import Call, described
from lightning_convbn.layers.graphs import DecidesForGraphs
from lightning_convbn.layers.marks import has_watching_hooks, mark, marked_plain, seen_through, unmarked
from lightning_convbn.layers.norms import affine_of, frozen_batch_norm
from lightning_convbn.layers.swap import run_plain
from lightning_convbn.ops.convolution import autocast, conv_bn, folded_conv, output_numel
from lightning_convbn.ops.fold import ConvSpec, Operands, fold_conv_bn, layout


class ConvBNLayer(DecidesForGraphs):
    """Base of the convolutions that apply the BatchNorm behind them, too.

    A subclass is made of `Tune` or `Deploy`, a geometry, and the plain layer, in this order.
    """

    weight: Tensor
    bias: Any  # a parameter, or None
    dims: int  # dimensions of a batched input; any other input runs unfolded
    _bn: tuple[nn.Module]
    _owns_weight: bool = False  # whether the weight is the module's own between two calls, and not sharded, say
    _reshaped: bool = False  # whether BatchNorm gets a view of the output, in which the last dimension are the channels

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Return the input with explicit padding where the convolution can't pad itself, and the geometry."""
        raise TypeError(f"{type(self).__name__} needs a geometry")

    def folded_forward(self, input: Tensor, operands: Operands, spec: ConvSpec | None) -> Tensor:
        """Run the folded pair."""
        raise TypeError(f"{type(self).__name__} must be a Tune or a Deploy class")

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the normalised output, marked for the BatchNorm of the pair; or the plain output, unmarked."""
        input = unmarked(input)
        arguments = () if output_size is None else (output_size,)
        pair = self.__dict__.get("_bn")
        if pair is not None and seen_through():
            return self._output_in_graph(pair[0], input, arguments)
        if pair is None or has_watching_hooks(self, pair[0]):
            return run_plain(self, input, *arguments)  # type: ignore[no-any-return]
        operands = self.operands()
        with without_torch_function():  # the input may be recomputable, and has functions for what is asked here
            call = Call(self, pair[0], input, arguments, *operands[:2])
            dim = input.dim()
        output = self.folded_output(input, dim, arguments, operands)
        marked = None if output is None else mark(output, call, channels=1 if dim == self.dims else 2)
        return marked_plain(run_plain(self, input, *arguments), call) if marked is None else marked

    def folded_output(self, input: Tensor, dim: int, arguments: tuple[Any, ...], operands: Operands) -> Tensor | None:
        """Run the folded pair; return None if the plain layers do it better, or if the input is not a batch."""
        rows = self._reshaped and dim == self.dims + 1
        if not rows and dim != self.dims:
            return None
        padded, spec = self.geometry(input.flatten(0, 1) if rows else input, *(arguments or (None,)))
        weight, gamma = operands[0], operands[2]
        only_gamma_is_trained = not weight.requires_grad and gamma is not None and gamma.requires_grad
        if only_gamma_is_trained and output_numel(padded, weight, spec) < padded.numel():
            return None  # Eval mode keeps the output then, and the fold would keep the input
        output = self.folded_forward(padded, operands, spec)
        return output.unflatten(0, input.shape[:2]) if rows else output

    def _output_in_graph(self, bn: nn.Module, input: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """Go by the proof. In a graph there are no marks, and a folded BatchNorm returns what it gets."""
        folds = not has_watching_hooks(self, bn) and self.folds_in_graph()
        output = self.folded_output(input, input.dim(), arguments, self.operands()) if folds else None
        if output is not None:
            return output
        plain: Tensor = run_plain(self, input, *arguments)
        if folds and self._reshaped and input.dim() != self.dims:
            _check_rows(self, input.dim(), self.dims)
            return frozen_batch_norm(bn, plain.flatten(0, 1)).unflatten(0, plain.shape[:2])
        return frozen_batch_norm(bn, plain) if folds else plain

    def operands(self) -> Operands:
        """Read what is folded. A forward pass does so once: a weight may be computed whenever it is read."""
        return read(self, "weight"), read(self, "bias"), *affine_of(self._bn[0])


def _check_rows(conv: nn.Module, given: int, dims: int) -> None:
    """Check the input of a linear layer that is folded in a graph, and whose BatchNorm gets a view of its output.

    Args:
        conv: The layer.
        given: The dimensions of its input.
        dims: Those of a batch. One more is a batch of rows.

    Raises:
        RuntimeError: If it is neither. The proof says nothing of that.
    """
    if given not in (dims, dims + 1):
        raise RuntimeError(
            f"{described(conv)} is folded in a graph with a BatchNorm that gets a view of its output. That is right "
            f"for inputs of {dims} or {dims + 1} dimensions, not for {given}: leave this pair out: set_mode(model, "
            "mode, pairs=...)"
        )


class Tune(ConvBNLayer):
    """Folds in every forward pass; gradients reach every parameter of the pair. Nothing is cached."""

    def folded_forward(self, input: Tensor, operands: Operands, spec: ConvSpec | None) -> Tensor:
        """Fold and convolve."""
        return conv_bn(input, *operands, spec)


class Fold(NamedTuple):
    """A fold, and what it was made of."""

    weight: Tensor
    bias: Tensor
    key: tuple[Any, ...]  # identity, version and address of each source, and all else that the fold depends on
    sources: list[Tensor]  # they hold their storages: an address in the key is not used a second time


class Deploy(ConvBNLayer):
    """Folds once, at the first forward pass that wants no gradient of a parameter. Others run as `Tune` does.

    The fold is made anew after a write that PyTorch counts: an optimizer's step, ``load_state_dict``, a move to another
    device. A write that it does not count is noticed at the next switch: through ``.data``, by numpy, or by another
    BatchNorm in Train mode that has the same buffers.
    """

    _fold: Fold | None = None

    def folded_forward(self, input: Tensor, operands: Operands, spec: ConvSpec | None) -> Tensor:
        """Convolve with the fold, or as in Tune mode where gradients or a graph would miss it."""
        sources = [operand for operand in operands if isinstance(operand, Tensor)]
        trained = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if trained or not self._owns_weight or _is_seen_through(input, sources):
            self._fold = None
            return conv_bn(input, *operands, spec)
        fold = self._current_fold(operands, sources, autocast(input, operands[0].dtype)[1], spec)
        return folded_conv(input, fold.weight, fold.bias, spec)

    def _current_fold(
        self, operands: Operands, sources: list[Tensor], dtype: torch.dtype, spec: ConvSpec | None
    ) -> Fold:
        """Return the kept fold, or make one. Several threads may run the model, so the attribute is read once."""
        identities = [id(operand) if isinstance(operand, Tensor) else operand for operand in operands]
        versions = [version_of(source) for source in sources]
        key = (dtype, *identities, *versions, *(source.data_ptr() for source in sources))
        fold = self._fold
        if fold is None or fold.key != key or None in versions:
            transposed, groups = layout(spec)
            with torch.inference_mode(False), torch.no_grad():
                folded = fold_conv_bn(*operands, transposed=transposed, groups=groups, dtype=dtype)
            fold = Fold(*folded, key, [source.detach() for source in sources])
            self._fold = fold if type(fold.weight) is Tensor else None  # a FakeTensorMode may be active
        return fold


def _is_seen_through(input: Tensor, sources: list[Tensor]) -> bool:
    """Whether a fold must be part of the graph: compiled, traced, transformed, or on tensors without data."""
    return (
        seen_through()
        or inside_transform()
        or any(type(source) not in (Tensor, nn.Parameter) or source.is_meta for source in (input, *sources))
    )


class ConvGeometry(ConvBNLayer):
    """Geometry of an ordinary convolution, all padding modes."""

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Pad where ``torch.convolution`` can't: other modes than zeros, and an uneven ``padding="same"``."""
        conv: Any = self
        padding = conv.padding
        if conv.padding_mode != "zeros" or isinstance(padding, str):
            input, padding = _padded(input, conv)
        return input, ConvSpec(conv.stride, padding, conv.dilation, False, conv.output_padding, conv.groups)


def _padded(input: Tensor, conv: nn.Conv2d) -> tuple[Tensor, tuple[int, ...]]:
    """Pad the input by what the convolution can't pad itself; return it and the padding that is left to do."""
    sides = [(size, size) for size in conv.padding] if not isinstance(conv.padding, str) else _sides(conv)
    zeros = conv.padding_mode == "zeros"
    padding = tuple(min(pair) if zeros else 0 for pair in sides)  # the convolution's own, equal on both sides
    rest = [size - own for pair, own in zip(reversed(sides), reversed(padding), strict=True) for size in pair]
    if any(rest) or not zeros:  # also with nothing to pad: it changes the layout in memory, as the plain layer does
        input = F.pad(input, rest, mode="constant" if zeros else conv.padding_mode)
    return input, padding


def _sides(conv: nn.Conv2d) -> list[tuple[int, int]]:
    """Padding before and after, for each dimension, of ``padding="valid"`` or ``"same"``."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    totals = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


class ConvTransposeGeometry(ConvBNLayer):
    """Geometry of a transposed convolution."""

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Turn ``output_size`` into the output padding.

        Raises:
            ValueError: If the convolution can't give an output of that size.
        """
        conv = cast(nn.ConvTranspose2d, self)
        padding = cast("tuple[int, ...]", conv.padding)
        extra: tuple[int, ...] = conv.output_padding
        if output_size is not None:
            sizes = list(output_size)[-len(conv.stride) :]
            smallest = [
                (size - 1) * stride - 2 * before + dilation * (kernel - 1) + 1
                for size, stride, before, dilation, kernel in zip(
                    input.shape[2:], conv.stride, padding, conv.dilation, conv.kernel_size, strict=True
                )
            ]
            extra = tuple(size - least for size, least in zip(sizes, smallest, strict=True))
            if not all(0 <= more < stride for more, stride in zip(extra, conv.stride, strict=True)):
                largest = [least + stride - 1 for least, stride in zip(smallest, conv.stride, strict=True)]
                raise ValueError(
                    f"requested an output size of {sizes}, but valid sizes range from {smallest} to {largest} (for an "
                    f"input of {list(input.shape[2:])})"
                )
        return input, ConvSpec(conv.stride, padding, conv.dilation, True, extra, conv.groups)


class LinearGeometry(ConvBNLayer):
    """A linear layer has none."""

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Return the input as it is."""
        return input, None
