"""The table of functions whose output can be computed again, and what is special about some of them.

Each row says how to compute the output out of place, how often that goes over the data, and what the function's own
backward pass reads. A function that is not in the table is run as it is: what it saves is saved with recipes, too, but
its output is nobody's concern.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_convbn.compat import FakeTensor

Function = Callable[..., Any]
EXACT = 256  # bfloat16, the coarsest dtype, has every whole number up to this one


class Clip(NamedTuple):
    """A function whose backward pass only reads whether each value of its output lies strictly between two bounds.

    Attributes:
        low: The lower bound.
        high: The upper bound; None if there is none.
        nan_is_between: Whether its backward pass takes NaN as a value between the bounds.
    """

    low: float
    high: float | None = None
    nan_is_between: bool = True

    def between(self, output: Tensor) -> Tensor:
        """Return which values of the output lie between the bounds, a boolean tensor."""
        if not self.nan_is_between:
            return output > self.low
        outside = output <= self.low
        return (outside if self.high is None else outside.logical_or_(output >= self.high)).logical_not_()

    def shows_in_bits(self, output: Tensor) -> bool:
        """Whether the backward pass needs no more than `between`.

        On a CPU the backward pass of a clamp takes NaN for clipped in its vectorised part, and elsewhere not. What is
        clipped has no infinity, so its sum is NaN only if a value is.
        """
        plain = self.high is None or output.device.type != "cpu" or isinstance(output, FakeTensor)
        return plain or not bool(output.detach().sum().isnan())

    def rebuild(self, between: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor with values between the bounds where the output has such, and elsewhere the lower bound."""
        rebuilt = between.to(dtype)
        if self.high is not None:
            rebuilt.mul_((self.high - self.low) / 2)
        return rebuilt.add_(self.low) if self.low else rebuilt  # each is a pass over the data


ClipOf = Callable[..., Clip | None]


def _no_clip(*_: Any, **__: Any) -> None:
    return None


class Row(NamedTuple):
    """How a function is treated.

    Attributes:
        compute: The function out of place; None if its output can't be computed again.
        passes: How often that goes over the data. A view does not.
        saves: ``"values"`` if it saves tensors for their values, ``"layout"`` if for their shape alone, ``"nothing"``.
        kind: What else is special about it.
        clip: Returns its `Clip`, if it is one with the arguments of a call.
        in_place: The function that writes its output over its first argument, to the same bits; None if there is none.
    """

    compute: Function | None
    passes: int = 1
    saves: Literal["values", "layout", "nothing"] = "values"
    kind: Literal["", "parts", "max-pool", "dropout", "convolution"] = ""
    clip: ClipOf = _no_clip
    in_place: Function | None = None


_RELU, _RELU6 = Clip(0), Clip(0, 6)


def _relu_clip(*_: Any, **__: Any) -> Clip:
    return _RELU


def _relu6_clip(*_: Any, **__: Any) -> Clip:
    return _RELU6


def _hardtanh_clip(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Clip | None:
    """The output shows what was clipped if the bounds are exact in every dtype."""
    exact = all(float(bound).is_integer() and abs(bound) <= EXACT for bound in (min_val, max_val))
    return Clip(min_val, max_val) if exact and min_val < max_val else None


def _leaky_relu_clip(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Clip | None:
    """The output has the signs of the input if the slope is positive."""
    return Clip(0, nan_is_between=False) if negative_slope > 0 else None


CLIPS: dict[str, ClipOf] = {
    "relu": _relu_clip,
    "relu6": _relu6_clip,
    "hardtanh": _hardtanh_clip,
    "leaky_relu": _leaky_relu_clip,
}
ACTIVATIONS = (
    *("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "celu", "selu", "silu", "mish", "gelu", "softplus"),
    *("hardswish", "hardsigmoid", "sigmoid", "tanh", "clamp", "square", "exp", "abs", "neg"),
)
PRODUCTS = ("mul", "multiply", "div", "divide", "true_divide")
SUMS = ("add", "sub", "subtract")
CONCATENATIONS = ("cat", "concat", "concatenate", "stack")
VIEWS = (
    *(
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "swapaxes",
        "movedim",
    ),
    *("unsqueeze", "squeeze", "expand", "expand_as", "chunk", "split", "narrow", "select", "unbind", "__getitem__"),
)
COPIES = (
    *("contiguous", "to", "half", "float", "double", "bfloat16", "roll", "flip"),
    *("channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
)
AVERAGE_POOLS = ("avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
MAX_POOLS = ("max_pool2d", "max_pool3d")
ADAPTIVE_MAX_POOLS = ("adaptive_max_pool2d", "adaptive_max_pool3d")
NORMS = ("layer_norm", "group_norm", "instance_norm", "rms_norm")
CONVOLUTIONS = tuple(f"{kind}{dims}d" for kind in ("conv", "conv_transpose") for dims in (1, 2, 3))


def _rows(names: Iterable[str], **treatment: Any) -> dict[Function, Row]:
    """Return the rows of all functions of these names, also in place, in ``torch``, its ``functional`` and `Tensor`."""
    rows: dict[Function, Row] = {}
    for name in names:
        for place in (F, torch, Tensor):
            plain = getattr(place, name, None) or getattr(Tensor, name, None)
            for spelled in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__"):
                function = getattr(place, spelled, None)
                if callable(function) and callable(plain):
                    compute = function if spelled == name or spelled.startswith("__r") else plain
                    clip = CLIPS.get(name, _no_clip)
                    in_place = _with_inplace(plain, True)
                    compute = _with_inplace(compute, False) or compute
                    rows[function] = Row(**{"compute": compute, "clip": clip, "in_place": in_place, **treatment})
    return rows


def _with_inplace(function: Function, in_place: bool) -> Function | None:
    """Return a function with its argument ``inplace`` set; None if it has none, as those that are not in functional."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except ValueError:  # a function in C++
        return None
    if "inplace" not in parameters:
        return None
    at = parameters.index("inplace")

    def compute(*args: Any, **kwargs: Any) -> Any:
        return function(*args[:at], **{**kwargs, "inplace": in_place})

    return compute


ROWS: dict[Function, Row] = {
    **_rows(ACTIVATIONS),
    **_rows(PRODUCTS),
    **_rows(SUMS, saves="nothing"),
    **_rows(CONCATENATIONS, saves="nothing", kind="parts"),
    **_rows(VIEWS, saves="nothing", passes=0),
    **_rows(COPIES, saves="nothing"),
    F.pad: Row(F.pad),
    F.batch_norm: Row(F.batch_norm),
    **_rows(NORMS, passes=2),
    **_rows([*AVERAGE_POOLS, *ADAPTIVE_MAX_POOLS], compute=None, saves="layout"),
    **_rows(MAX_POOLS, compute=None, saves="layout", kind="max-pool"),
    **_rows(CONVOLUTIONS, compute=None, kind="convolution"),
    **_rows(["dropout"], kind="dropout"),
}
