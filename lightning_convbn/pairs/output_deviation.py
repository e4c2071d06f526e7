"""How far two outputs of a model deviate from each other, and how far rounding may make them deviate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.pairs.side_effects import tensors_of

# The relative deviation that rounding may cause. On torchvision's classifiers we measured less than 1e-5 in float32 and
# less than 4e-2 in bfloat16. A pair that is folded wrongly changes the output by 0.3 and more.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

PARTS = 32


def float_tensors(output: Any) -> list[Tensor]:
    """List the floating-point tensors of an output: only these can be compared within a tolerance."""
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


def tolerance_of(model: nn.Module, outputs: Sequence[Tensor]) -> float:
    """Return the relative deviation that rounding may cause.

    The lowest precision counts: that of the parameters, of the outputs, or of autocast if it is on.

    Args:
        model: The model that has computed the outputs.
        outputs: Floating-point tensors.
    """
    tensors = [*outputs, *(parameter for parameter in model.parameters() if parameter.is_floating_point())]
    dtypes = {tensor.dtype for tensor in tensors}
    dtypes |= {
        torch.get_autocast_dtype(device)
        for device in {tensor.device.type for tensor in tensors}
        if torch.is_autocast_enabled(device)
    }
    tolerance = max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes)
    if any(tensor.is_cuda for tensor in tensors) and torch.backends.cudnn.allow_tf32:
        tolerance = max(tolerance, 10 * TOLERANCES[torch.float32])  # TF32 rounds a convolution's inputs to 10 bits
    return tolerance


def deviation_of(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative deviation of a tensor from what is expected; infinity if shapes differ."""
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        return float("inf")
    return max((_relative(output, other) for output, other in zip(outputs, expected, strict=True)), default=0.0)


def _relative(output: Tensor, expected: Tensor) -> float:
    """Return the relative deviation, by norms. Parts are compared one after the other: copies in float64 are large."""
    differences, norms = [], []
    for one, other in zip(_parts(output), _parts(expected), strict=True):
        # A masked score is minus infinity in both. Where neither number is finite, they count as equal.
        same = ~(one.isfinite() | other.isfinite())
        one, other = (tensor.to(torch.float64).masked_fill(same, 0.0) for tensor in (one, other))
        differences.append(torch.linalg.vector_norm(one - other))
        norms.append(torch.linalg.vector_norm(other))
    difference, norm = (float(torch.linalg.vector_norm(torch.stack(parts))) for parts in (differences, norms))
    return difference / max(norm, 1e-12) if difference else 0.0


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Divide a tensor by samples."""
    return tensor.chunk(PARTS) if tensor.dim() else [tensor]
