"""The activations whose output can be recomputed in the backward pass, and the classes that they are swapped to.

The table has elementwise activations that keep their input for the backward pass. `torch.nn.ReLU` is not in it: it
keeps its output, and the next layer keeps that anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convbn.layers.swap import Converted, run_plain
from lightning_convbn.layers.table import row_of
from lightning_convbn.ops.recomputed_activations import recomputed

EXACT = 256  # bfloat16, the coarsest dtype, has every whole number up to this one


class RecomputedActivation(Converted):
    """Base of the swapped activations: runs the activation as it was found, and marks its output."""

    def out_of_place(self) -> Callable[[Tensor], Tensor] | None:
        """Return a function that computes what the activation computes, and does not write into its input.

        None if the backward pass can use the output of the activation in the place of its input. Then nothing has to be
        computed again.
        """
        raise TypeError(f"{type(self).__name__} must say what it computes")

    def forward(self, input: Tensor) -> Tensor:
        """Return the activated input. If a later layer saves it, autograd saves a recipe instead."""
        output: Tensor = run_plain(self, input)
        marks = isinstance(output, Tensor) and isinstance(self, RecomputedActivation)
        return recomputed(output, input, self.out_of_place()) if marks else output


class RecomputedSiLU(RecomputedActivation, nn.SiLU):
    """`torch.nn.SiLU`, recomputed."""

    def out_of_place(self) -> Callable[[Tensor], Tensor]:
        """Return SiLU."""
        return F.silu


class RecomputedHardswish(RecomputedActivation, nn.Hardswish):
    """`torch.nn.Hardswish`, recomputed."""

    def out_of_place(self) -> Callable[[Tensor], Tensor]:
        """Return Hardswish."""
        return F.hardswish


class RecomputedMish(RecomputedActivation, nn.Mish):
    """`torch.nn.Mish`, recomputed."""

    def out_of_place(self) -> Callable[[Tensor], Tensor]:
        """Return Mish."""
        return F.mish


class RecomputedGELU(RecomputedActivation, nn.GELU):
    """`torch.nn.GELU`, recomputed."""

    def out_of_place(self) -> Callable[[Tensor], Tensor]:
        """Return GELU in its approximation."""
        return partial(F.gelu, approximate=self.approximate)


class RecomputedHardtanh(RecomputedActivation, nn.Hardtanh):
    """`torch.nn.Hardtanh`. It keeps its output in the place of its input; with inexact bounds it is recomputed."""

    def out_of_place(self) -> Callable[[Tensor], Tensor] | None:
        """Return None if the bounds are exact in every dtype: the output then shows which values were clipped."""
        bounds = self.min_val, self.max_val
        if all(float(bound).is_integer() and abs(bound) <= EXACT for bound in bounds):
            return None
        return partial(F.hardtanh, min_val=self.min_val, max_val=self.max_val)


class RecomputedReLU6(RecomputedHardtanh, nn.ReLU6):
    """`torch.nn.ReLU6`. It keeps its output in the place of its input."""


class RecomputedLeakyReLU(RecomputedActivation, nn.LeakyReLU):
    """`torch.nn.LeakyReLU`. It keeps its output in the place of its input, unless it works in place."""

    def out_of_place(self) -> Callable[[Tensor], Tensor] | None:
        """Return None if the slope is positive: the output then has the signs of the input."""
        slope = self.negative_slope
        return None if slope > 0 else partial(F.leaky_relu, negative_slope=slope)


class RecomputedELU(RecomputedActivation, nn.ELU):
    """`torch.nn.ELU`, recomputed unless it works in place."""

    def out_of_place(self) -> Callable[[Tensor], Tensor]:
        """Return ELU with its alpha."""
        return partial(F.elu, alpha=self.alpha)


class RecomputedExactGELU(RecomputedActivation):
    """timm's ``GELU``, which takes an argument ``inplace`` and ignores it, recomputed."""

    def out_of_place(self) -> Callable[[Tensor], Tensor]:
        """Return GELU."""
        return F.gelu


class RecomputedTanhGELU(RecomputedActivation):
    """timm's ``GELUTanh``, recomputed."""

    def out_of_place(self) -> Callable[[Tensor], Tensor]:
        """Return GELU by its tanh approximation."""
        return partial(F.gelu, approximate="tanh")


# Keys are exact classes, or their qualified names, as in the tables of convolutions and BatchNorms.
ACTIVATION_LAYERS: dict[type[nn.Module] | str, type[RecomputedActivation]] = {
    nn.SiLU: RecomputedSiLU,
    nn.Hardswish: RecomputedHardswish,
    nn.Mish: RecomputedMish,
    nn.GELU: RecomputedGELU,
    nn.Hardtanh: RecomputedHardtanh,
    nn.ReLU6: RecomputedReLU6,
    nn.LeakyReLU: RecomputedLeakyReLU,
    nn.ELU: RecomputedELU,
    "timm.layers.activations.GELU": RecomputedExactGELU,
    "timm.layers.activations.GELUTanh": RecomputedTanhGELU,
}


def activation_layer(module: nn.Module) -> type[RecomputedActivation] | None:
    """The table's row of an activation: of its exact class, a subclass may compute something else."""
    return row_of(ACTIVATION_LAYERS, module)


def recomputes_activations(model: nn.Module) -> bool:
    """Whether `set_mode` has put a model in a mode with ``recompute="elementwise"``."""
    return any(isinstance(module, RecomputedActivation) for module in model.modules())
