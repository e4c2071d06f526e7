"""A call of a folded convolution, and the output that the plain convolution would have given in it.

Every forward pass makes a call for each pair, and hardly ever asks it anything. So a call is quick to make: it takes
what may be another later, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_convbn.compat import inside_transform, read, version_of
from lightning_convbn.layers.swap import class_name, plain_class
from lightning_convbn.ops.autocast import autocast_dtype, in_autocast


class Call:
    """A call of a folded convolution: all that its plain output can be computed from, and what has become of it.

    Make it in the call, with torch functions off for subclasses.

    Args:
        conv: The convolution.
        bn: Its BatchNorm.
        input: What the convolution gets.
        arguments: What it gets beside that.
        weight: Its weight, as it was read for this call.
        bias: Its bias, the same.

    Attributes:
        with_grad: Whether gradients are wanted.
        folded: What the folded convolution has put out.
        plain: The plain output, once somebody has asked for it.
        taken: Whether the BatchNorm has the folded output.
    """

    __slots__ = (
        "_arguments",
        "_autocast",
        "_device",
        "_input",
        "_parameters",
        "_versions",
        "bn",
        "conv",
        "folded",
        "plain",
        "taken",
        "with_grad",
    )

    def __init__(
        self,
        conv: nn.Module,
        bn: nn.Module,
        input: Tensor,
        arguments: tuple[Any, ...],
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        self.conv, self.bn = conv, bn
        self.with_grad = torch.is_grad_enabled()
        self.folded: Tensor | None = None
        self.plain: Tensor | None = None
        self.taken = False
        self._input, self._arguments = input, arguments
        self._parameters = _parameters_of(conv, weight, bias)
        self._versions = [version_of(input), *versions_of(self._parameters)]
        self._device = input.device.type
        self._autocast = autocast_dtype(self._device)

    def is_trained(self) -> bool:
        """Whether a parameter of the pair wants a gradient."""
        tensors = *self._parameters, read(self.bn, "weight"), read(self.bn, "bias")
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def plain_output(self) -> Tensor:
        """Run the plain convolution, as it would have run in that call. It runs once.

        Raises:
            RuntimeError: If its input was written since, or its parameters were written or replaced.
        """
        if self.plain is None:
            self._check()
            with self._state():
                self.plain = plain_class(self.conv).forward(self.conv, self._input, *self._arguments)
        return self.plain

    def _check(self) -> None:
        conv: Any = self.conv
        parameters = _parameters_of(conv, conv.weight, conv.bias)
        same = len(parameters) == len(self._parameters) and all(map(is_, parameters, self._parameters))
        if not same or [version_of(self._input), *versions_of(parameters)] != self._versions:
            raise RuntimeError(
                f"{described(self.conv)} is folded with its BatchNorm. Its own output is read, but its input or its "
                "weight was written or replaced since. Read the output before that, or leave this pair out: "
                "set_mode(model, mode, pairs=...)"
            )
        if self._gives_another():
            raise RuntimeError(
                f"{described(self.conv)} is folded with its BatchNorm. Its own output is read in inference mode, where "
                "PyTorch does not count writes, but its input or its normalised output was written since (by an "
                "activation in place, say). Read the output before that, use torch.no_grad(), or leave this pair out: "
                "set_mode(model, mode, pairs=...)"
            )

    def _gives_another(self) -> bool:
        """Whether the folded convolution would put out something else now; asked where writes are not counted.

        A tensor of inference mode has no version. So the folded convolution runs a second time, to compare.
        """
        folded = self.folded
        if folded is None or None not in self._versions or type(folded) is not Tensor or folded.is_meta:
            return False
        if inside_transform():  # no number can be read there
            return False
        conv, dim = cast(Any, self.conv), self._input.dim()
        with self._state():
            folds = _is_folded(self)
            again = conv.folded_output(self._input, dim, self._arguments, conv.operands()) if folds else None
        bound = torch.finfo(folded.dtype).eps ** 0.5
        scale = float(folded.abs().max()) if folded.numel() else 0.0
        return again is None or not torch.allclose(again, folded, bound, bound * scale, equal_nan=True)

    @contextmanager
    def _state(self) -> Iterator[None]:
        """What was in force in the call: gradients, and autocast."""
        with torch.set_grad_enabled(self.with_grad), in_autocast(self._device, self._autocast):
            yield


def described(layer: nn.Module) -> str:
    """Class and geometry of a layer, to find it in ``print(model)``. It does not know its qualified name."""
    return f"{class_name(layer)}({layer.extra_repr()})"


def _parameters_of(conv: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a convolution computes from: its weight and bias, or, if its weight is computed itself, all that it has."""
    if type(weight) is nn.Parameter:
        return weight, bias
    return *conv.parameters(), *conv.buffers()


def versions_of(tensors: Iterable[Tensor | None]) -> list[int | None]:
    """How often tensors were written in place, and where parameters lie: ``.data = ...`` moves them."""
    versions: list[int | None] = []
    for tensor in tensors:
        if tensor is not None:
            versions.append(version_of(tensor))
            if type(tensor) is nn.Parameter:
                versions.append(tensor.data_ptr())
    return versions


def _is_folded(call: Call) -> bool:
    """Whether the pair of a call is converted still."""
    return vars(call.conv).get("_bn", (None,))[0] is call.bn
