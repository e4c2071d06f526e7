"""How tests compare: relative errors and their bounds, outputs by mode, and all that a switch must bring back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from helpers.networks import images
from lightning_convbn import ConvBNPairs, Mode, conv_bn_mode

# How much two ways to compute the same may differ in float64, relative to the norm. One rounding is at most 2**-53, so
# these are 9 thousand and 9 hundred thousand of them. The rounding errors of sums of K products in L layers grow as the
# root of K * L, which is at most 1224 here (K = 4608, L = 325). A wrong fold, a cast to float32 on the way (2**-24), or
# another epsilon of a BatchNorm makes more than 1e-8. So the bounds hold on any processor, and miss no mistake.
# In float32 no such bound holds for gradients and choices: where a rounding changes the sign of a ReLU's input, or the
# order of two scores, they jump.
FORWARD = 1e-12
BACKWARD = 1e-10  # the activations' errors come in, too, and the norm of a gradient may be far below that of its terms


def relative(output: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    output, expected = output.detach().double(), expected.detach().double()
    difference = float(torch.linalg.vector_norm(output - expected))
    return difference / max(float(torch.linalg.vector_norm(expected)), 1e-300)


def assert_close(outputs: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Compare tensors one by one: shape, dtype, finite values within a relative tolerance."""
    assert [(output.shape, output.dtype) for output in outputs] == [(other.shape, other.dtype) for other in expected]
    assert all(bool(other.isfinite().all()) for other in expected)
    errors = [relative(output, other) for output, other in zip(outputs, expected, strict=True)]
    assert max(errors, default=0.0) <= tolerance, errors


def gradients(output: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    """Differentiate a random projection of an output, the same one for outputs of the same shape."""
    probe = images(*output.shape, seed=2).to(output.dtype)
    return torch.autograd.grad((output * probe).sum(), wanted)


class Snapshot(NamedTuple):
    """All that a switch there and back must bring back."""

    text: str
    classes: list[type[nn.Module]]
    attributes: list[set[str]]
    training: list[bool]
    parameters: list[int]
    tensors: dict[str, bytes]
    hooks: list[int]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Take down a model; tensors by their bits."""
        modules = list(model.modules())
        return cls(
            str(model),
            [type(module) for module in modules],
            [set(vars(module)) for module in modules],
            [module.training for module in modules],
            [id(parameter) for parameter in model.parameters()],
            {name: tensor.clone().numpy().tobytes() for name, tensor in model.state_dict().items()},
            [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules],
        )


def floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor of an output, however nested."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def outputs(
    model: nn.Module, mode: Mode, *inputs: Any, pairs: ConvBNPairs | None = None, **kwargs: Any
) -> list[Tensor]:
    """Run a model in a mode, without gradients."""
    with conv_bn_mode(model, mode, pairs=pairs), torch.no_grad():
        return floats(model(*inputs, **kwargs))


def in_float64(leaf: Any) -> Any:
    """Convert a tensor of floating-point numbers."""
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
