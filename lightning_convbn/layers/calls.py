"""A call of a folded convolution, and the output that the plain convolution would have given in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_convbn.compat import has_affine, inside_transform, pack_hook, versions_in_call, versions_of_affine
from lightning_convbn.layers.state import Pair
from lightning_convbn.ops.autocast import autocast, in_autocast
from lightning_convbn.ops.convolution import conv_bn, convolve
from lightning_convbn.ops.fold import ConvSpec, Operands
from lightning_convbn.ops.recipes import itself


class Call(NamedTuple):
    """A call of a folded convolution: all that its plain output can be computed from.

    Each forward of a pair makes one, and hardly ever asks it anything. So it computes nothing beforehand.
    """

    pair: Pair
    input: Tensor  # with what is padded beforehand
    operands: Operands  # as they were read for this call
    spec: ConvSpec | None
    versions: tuple[int, ...] | None  # of input, weight and bias; None where PyTorch does not count writes
    affine_versions: tuple[int, ...] | None  # of what the BatchNorm multiplies and adds; as above
    pack_hook: Any  # the saved-tensor hook in force, as under a checkpoint; None if there is none
    with_grad: bool  # whether gradients are wanted
    autocast: torch.dtype | None  # the dtype of autocast; None if it is off
    folded: Tensor  # what the folded convolution has put out

    def wants_gradient(self) -> bool:
        """Whether the plain output wants a gradient."""
        tensors = (self.input, *self.operands[:2])
        return self.with_grad and any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def is_up_to_date(self) -> bool:
        """Whether the BatchNorm still computes what was folded: nobody has given it other tensors, or written them."""
        _, _, gamma, beta, mean, var, eps = self.operands
        bn: Any = self.pair.bn
        same = has_affine(bn, gamma, beta, mean, var) and getattr(bn, "eps", eps) == eps
        return same and versions_of_affine(gamma, beta, mean, var) == self.affine_versions

    def is_trained(self) -> bool:
        """Whether a parameter of the pair wants a gradient."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.operands[:4])

    def plain_output(self) -> Tensor:
        """Run the plain convolution, as it would have run in this call.

        Raises:
            RuntimeError: If its input or its parameters were written since.
        """
        weight, bias = self.operands[:2]
        if versions_in_call(self.input, weight, bias) != self.versions:
            raise RuntimeError(
                f"{names_of(self.pair)}. The output between the two is read, but the input or the weight of the "
                "convolution was written since. Read the output before that, or leave this pair out: "
                "set_mode(model, mode, pairs=...)"
            )
        if self.versions is None and self._gives_another():
            raise RuntimeError(
                f"{names_of(self.pair)}. The output between the two is read in inference mode, where PyTorch does not "
                "count writes, but the input or the normalised output was written since (by an activation in place, "
                "say). Read the output before that, use torch.no_grad(), or leave this pair out: "
                "set_mode(model, mode, pairs=...)"
            )
        with self._state():
            input, dtype = autocast(self.input, weight.dtype, self.autocast)
            return convolve(input, weight.to(dtype), None if bias is None else bias.to(dtype), self.spec)

    def _gives_another(self) -> bool:
        """Whether the folded convolution would put out something else now; asked where writes are not counted.

        A tensor of inference mode has no version. So the folded convolution runs a second time, to compare.
        """
        folded = self.folded
        if type(folded) is not Tensor or folded.is_meta or inside_transform():  # no number can be read there
            return False
        with self._state():
            again = conv_bn(self.input, self.operands, self.spec, self.autocast)
        bound = torch.finfo(folded.dtype).eps ** 0.5
        scale = float(folded.abs().max()) if folded.numel() else 0.0
        return not torch.allclose(again, folded, bound, bound * scale, equal_nan=True)

    @contextmanager
    def _state(self) -> Iterator[None]:
        """What was in force in the call: gradients, autocast, and no hooks of a checkpoint that has begun since."""
        hook = pack_hook()
        as_it_is = hook is not None and hook is not self.pack_hook
        hooks = saved_tensors_hooks(itself, itself) if as_it_is else nullcontext()
        with torch.set_grad_enabled(self.with_grad), in_autocast(self.input.device.type, self.autocast), hooks:
            yield


def names_of(pair: Pair) -> str:
    """Class and geometry of both layers, to find them in ``print(model)``. They don't know their qualified names."""
    return f"{described(pair.conv)} and its {described(pair.bn)} are folded"


def described(layer: nn.Module) -> str:
    """Class and geometry of a layer."""
    try:
        return f"{type(layer).__name__}({type(layer).extra_repr(layer)})"
    except Exception:  # it can't show what a user has set: ``padding = 1``, say
        return type(layer).__name__
