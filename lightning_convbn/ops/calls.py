"""One call of a function of the table: what it saves, and what its output can be computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convbn.compat import storage_id
from lightning_convbn.ops.elementwise import Clip, Function, Row
from lightning_convbn.ops.packed import LARGEST_WINDOW, PackedBits, Window, layout_of, recipe_of_indices
from lightning_convbn.ops.recipes import Recipe, Source
from lightning_convbn.ops.repetition import Constants, Repetition, batch_norm_again, constants_of
from lightning_convbn.ops.values import Holder, Loan, Value

ValueOf = Callable[[object], Value | None]


class Call:
    """One call of a function of the table.

    Args:
        func: The function.
        row: Its row in the table.
        args: Its positional arguments. The first one is a tensor, or holds the parts of a concatenation.
        kwargs: Its keyword arguments.
        value_of: Returns the value of a tensor; None if it has none.

    Attributes:
        tensors: The tensors among the arguments.
        loan: What the output must hold alive while it is alive itself; None for nothing.
    """

    def __init__(
        self, func: Function, row: Row, args: tuple[Any, ...], kwargs: dict[str, Any], value_of: ValueOf
    ) -> None:
        self._func, self._row, self._args, self._kwargs = func, row, args, kwargs
        self._given = [*args[0], *args[1:]] if row.kind == "parts" else args
        self.tensors = [leaf for leaf in (*self._given, *kwargs.values()) if isinstance(leaf, Tensor)]
        self._value_of = value_of
        self._values = [value_of(tensor) for tensor in self.tensors]
        self.loan: Loan | None = None
        self._saved: list[tuple[Tensor, Holder]] = []

    def pack(self, tensor: Tensor) -> Recipe:
        """Return what the autograd graph keeps in the place of a tensor that the function saves."""
        if self._saves_layout(tensor):
            return layout_of(tensor, dense=self._func is F.batch_norm)
        if self._row.saves == "layout":
            return self._recipe_of_indices(tensor) if self._row.kind == "max-pool" else Source(tensor).value
        value = self._value_of(tensor)
        holder = Holder(Value.kept(tensor)) if value is None else value.save(tensor)
        self._saved.append((tensor, holder))
        return holder

    def _saves_layout(self, tensor: Tensor) -> bool:
        """Whether a tensor is saved for its shape alone: by a pool, or by a layer whose weight is not trained."""
        if self._row.kind == "convolution":
            return tensor is self.tensors[0] and not _trained_weight(*self._args, **self._kwargs)
        if self._func is F.batch_norm:
            return tensor is self.tensors[0] and not _reads_input(*self._args, **self._kwargs)
        return self._row.saves == "layout" and tensor.is_floating_point()

    def finish(self, output: Any) -> Iterator[tuple[Tensor, Value]]:
        """Yield each tensor that the function has put out, with its value."""
        if self._row.kind == "max-pool" and self._values[0] is not None:
            pack_clipped(self._values[0], self.tensors[0])
        several = isinstance(output, (tuple, list))
        for index, tensor in enumerate(output if several else (output,)):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.grad_fn is not None:
                yield tensor, self._finish(tensor, index if several else None)

    def _finish(self, output: Tensor, index: int | None) -> Value:
        storage = storage_id(output)
        if self._is_argument(output):  # it was written: what is kept in its storage is no longer the input
            self._values = [None if value is not None and value.reads(storage) else value for value in self._values]
            self._adopt_copy(output)
        value = self._dropped_out() if self._row.kind == "dropout" else self._value_of_output(output, index)
        inputs = [given for given in self._values if given is not None]
        value.frozen = all(given.frozen for given in inputs) and not any(map(_is_trained, self.tensors))
        clip = self._row.clip(*self._args, **self._kwargs)
        for saved, holder in self._saved:
            is_output = storage_id(saved) == storage
            if is_output:
                value.secure(output)
                holder.take(value)
            if clip is not None and (is_output or holder.value in inputs):
                holder.clip, value.own = clip, ref(holder)
        if clip is not None and value.frozen:
            pack_clipped(value, output)
        return value

    def _value_of_output(self, output: Tensor, index: int | None) -> Value:
        """Return a value that knows how to compute the output from the arguments, if that is possible."""
        if self._row.compute is None:
            return Value()
        if self._func is F.batch_norm and _uses_batch_statistics(*self._args, **self._kwargs):
            known = self._values[0] or self._value_saved(self.tensors[0])
            again = batch_norm_again(output, *self._args, **self._kwargs)
            return Value() if known is None or again is None else Value(again, [known])
        constants = constants_of(self._given, self._kwargs)
        if constants is None or (self._is_argument(output) and not self._out_of_place_is_alike(output)):
            return Value()
        if self._row.kind == "parts":
            return self._concatenation(constants)
        inputs: list[Value] = []
        fixed: list[Source | None] = []
        for tensor, value in zip(self.tensors, self._values, strict=True):
            known = value if value is not None or tensor is output else self._value_saved(tensor)
            if known is None and not (isinstance(tensor, nn.Parameter) and self._row.saves == "values"):
                return Value()
            fixed.append(Source(tensor) if known is None else None)
            inputs += [] if known is None else [known]
        if len(inputs) == 1 and output is not self.tensors[0] and storage_id(output) == storage_id(self.tensors[0]):
            self.loan = self.loan or Loan([Source(self.tensors[0])])  # a view: who keeps it, keeps what it shows
        return Value(self._from_tensors(constants, fixed, index), inputs, self._row.passes, self.loan)

    def _value_saved(self, tensor: Tensor) -> Value | None:
        return next((holder.value for saved, holder in self._saved if saved is tensor), None)

    def _is_argument(self, output: Tensor) -> bool:
        """Whether the function has worked in place. Then the argument *is* the output."""
        return any(output is tensor for tensor in self.tensors)

    def _out_of_place_is_alike(self, output: Tensor) -> bool:
        """Whether the function gives the same bits out of place: it may choose another dtype, and other strides."""
        dense = torch.empty_like(output, device="meta").stride() == output.stride()
        return dense and all(tensor.dtype is output.dtype or not tensor.dim() for tensor in self.tensors)

    def _concatenation(self, constants: Constants) -> Value:
        """Each part is kept once, in however many concatenations it is."""
        inputs = [value for value in self._values if value is not None]
        if len(inputs) < len(self._values):
            return Value()
        self.loan = Loan(Source(tensor) for tensor in self.tensors)
        function = self._from_tensors(constants, [None] * len(inputs), None)
        return Value(function, inputs, self._row.passes, self.loan)

    def _from_tensors(self, constants: Constants, fixed: Sequence[Source | None], index: int | None) -> Repetition:
        """Return the call as a function of its tensors, without those that are fixed."""
        parts = len(self._args[0]) if self._row.kind == "parts" else 0
        return Repetition(self._row, constants, parts, fixed, index, self.tensors[0].device.type)

    def _adopt_copy(self, output: Tensor) -> None:
        """A function that works in place has saved a copy of its input, made before the write: it has those values."""
        if not self.tensors or output is not self.tensors[0]:
            return
        for saved, holder in self._saved:
            given = storage_id(saved) == storage_id(output) or any(saved is tensor for tensor in self.tensors)
            # A vectorised function does not give the same bits along other strides.
            same = (saved.shape, saved.stride(), saved.dtype) == (output.shape, output.stride(), output.dtype)
            if not given and same:
                value = self._values[0] = self._values[0] or holder.value
                value.secure(saved)
                holder.take(value)

    def _dropped_out(self) -> Value:
        """The output of a dropout, whose noise is kept at one bit for each value."""
        p = _dropout_rate(*self._args, **self._kwargs)
        input = self.tensors[0]
        for saved, holder in self._saved:
            if 0 < p < 1 and saved is not input and saved.shape == input.shape:
                noise = _packed_noise(saved, p)
                holder.take(noise)
                if saved.dtype is input.dtype and self._values[0] is not None:
                    return Value(torch.mul, [self._values[0], noise])
        return Value()

    def _recipe_of_indices(self, index: Tensor) -> Recipe:
        dims = 3 if self._func in (F.max_pool3d, torch.max_pool3d) else 2
        spatial = self.tensors[0].shape[-dims:]
        window = _window(dims, *self._args, **self._kwargs)
        return recipe_of_indices(index, spatial, window) if window.positions <= LARGEST_WINDOW else Source(index).value


def pack_clipped(value: Value, tensor: Tensor) -> None:
    """Have a function that was clipped keep one bit for each value, if nobody else keeps what it needs.

    Args:
        value: The value of what it has put out.
        tensor: That.
    """
    own = value.own()
    if own is not None and not own.sees_bits and own.value.has_one_user:
        assert own.clip is not None
        if own.clip.shows_in_bits(tensor):
            own.take(_packed_clip(own.clip, tensor), bits=True)


def _packed_clip(clip: Clip, tensor: Tensor) -> Value:
    dtype, packed = tensor.dtype, PackedBits(clip.between(tensor.detach()))
    return Value.computed(lambda: clip.rebuild(packed.unpack(), dtype))


def _packed_noise(noise: Tensor, p: float) -> Value:
    """A dropout's noise is 0, or 1 over the rate at which values are kept; on some devices 0 or 1."""
    dtype, packed = noise.dtype, PackedBits(noise.to(torch.bool))
    if dtype is torch.bool:
        return Value.computed(packed.unpack)
    return Value.computed(lambda: packed.unpack().to(dtype).div_(1 - p))


def _is_trained(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad


def _trained_weight(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> bool:
    return weight.requires_grad


def _uses_batch_statistics(
    input: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, *_: Any, **__: Any
) -> bool:
    return training


def _reads_input(
    input: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, *_: Any, **__: Any
) -> bool:
    """Whether the backward pass of a BatchNorm reads the values of its input."""
    return training or (weight is not None and weight.requires_grad)


def _dropout_rate(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool = True
) -> float:
    return p if training and train else 0.0


def _window(
    dims: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    *_: Any,
    **__: Any,
) -> Window:
    return Window.of(dims, kernel_size, stride, padding, dilation)
