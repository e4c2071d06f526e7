"""A call of a folded convolution, and the output that the plain convolution would have given in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_convbn.compat import inside_transform, version_of
from lightning_convbn.layers.swap import class_name, plain_class
from lightning_convbn.ops.autocast import Context, same_autocast


class Call(NamedTuple):
    """A call of a folded convolution: all that its plain output can be computed from."""

    conv: nn.Module
    bn: nn.Module
    input: Tensor
    arguments: tuple[Any, ...]  # beside the input
    parameters: tuple[Tensor | None, ...]
    versions: list[int | None]  # of the input and the parameters, and where these lie
    with_grad: bool
    autocast: Context  # returns what was in force

    @classmethod
    def of(cls, conv: nn.Module, bn: nn.Module, input: Tensor, arguments: tuple[Any, ...]) -> Call:
        """Describe the call that is running."""
        parameters, autocast = _parameters_of(conv), same_autocast(input.device.type)
        versions = _versions_of(input, parameters)
        return cls(conv, bn, input, arguments, parameters, versions, torch.is_grad_enabled(), autocast)

    def plain_output(self, folded: Tensor) -> Tensor:
        """Run the plain convolution, as it would have run in that call.

        Args:
            folded: What the folded convolution has put out.

        Raises:
            RuntimeError: If its input was written since, or its parameters were written or replaced.
        """
        parameters = _parameters_of(self.conv)
        same = len(parameters) == len(self.parameters) and all(map(_is, parameters, self.parameters))
        if not same or _versions_of(self.input, parameters) != self.versions:
            raise RuntimeError(
                f"{described(self.conv)} is folded with its BatchNorm. Its own output is read, but its input or its "
                "weight was written or replaced since. Read the output before that, or leave this pair out: "
                "set_mode(model, mode, pairs=...)"
            )
        if self._gives_another(folded):
            raise RuntimeError(
                f"{described(self.conv)} is folded with its BatchNorm. Its own output is read in inference mode, where "
                "PyTorch does not count writes, but its input or its normalised output was written since (by an "
                "activation in place, say). Read the output before that, use torch.no_grad(), or leave this pair out: "
                "set_mode(model, mode, pairs=...)"
            )
        with self._state():
            output: Tensor = plain_class(self.conv).forward(self.conv, self.input, *self.arguments)
            return output

    def _gives_another(self, folded: Tensor) -> bool:
        """Whether the folded convolution would put out something else now; asked where writes are not counted.

        A tensor of inference mode has no version. So the folded convolution runs a second time, to compare.
        """
        if None not in self.versions or type(folded) is not Tensor or folded.is_meta:
            return False
        if inside_transform():  # no number can be read there
            return False
        with self._state():
            again: Any = self.conv.folded_output(self.bn, self.input, self.arguments) if _is_folded(self) else None  # type: ignore[operator]
        bound = torch.finfo(folded.dtype).eps ** 0.5
        scale = float(folded.abs().max()) if folded.numel() else 0.0
        return again is None or not torch.allclose(again, folded, bound, bound * scale, equal_nan=True)

    @contextmanager
    def _state(self) -> Iterator[None]:
        """What was in force in the call: gradients, and autocast."""
        with torch.set_grad_enabled(self.with_grad), self.autocast():
            yield


def described(layer: nn.Module) -> str:
    """Class and geometry of a layer, to find it in ``print(model)``. It does not know its qualified name."""
    return f"{class_name(layer)}({layer.extra_repr()})"


def _parameters_of(conv: nn.Module) -> tuple[Tensor | None, ...]:
    """What a convolution computes from: its weight and bias, or, if its weight is computed itself, all that it has."""
    weight, bias = conv.weight, conv.bias
    if type(weight) is nn.Parameter:
        return weight, bias  # type: ignore[return-value]
    return *conv.parameters(), *conv.buffers()


def _versions_of(input: Tensor, parameters: tuple[Tensor | None, ...]) -> list[int | None]:
    """How often the tensors of a call were written in place, and where parameters lie: ``.data = ...`` moves them."""
    versions = [version_of(input)]
    for parameter in parameters:
        if parameter is not None:
            versions.append(version_of(parameter))
            if type(parameter) is nn.Parameter:
                versions.append(parameter.data_ptr())
    return versions


def _is(one: object, other: object) -> bool:
    return one is other


def _is_folded(call: Call) -> bool:
    """Whether the pair of a call is converted still."""
    return vars(call.conv).get("_bn", (None,))[0] is call.bn
