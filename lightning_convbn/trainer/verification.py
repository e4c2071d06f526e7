"""The last word on a pair: does the folded model compute on real inputs what Eval mode computes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.layers.swap import Mode
from lightning_convbn.modes import conv_bn_mode
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.find import ConvBNPairs
from lightning_convbn.pairs.fsdp import communicates
from lightning_convbn.pairs.side_effects import leaves_of, state_kept

# Relative deviation that rounding may cause. Measured on torchvision's classifiers: below 1e-5 in float32 and 4e-2 in
# bfloat16, while a pair that is folded wrongly moves the output by 0.3 and more.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Verification:
    """What `verify_pairs` has found.

    Attributes:
        deviation: Largest relative deviation of an output tensor in Tune mode from Eval mode's, all pairs folded.
        tolerance: What rounding may cause in the precision that the model ran in.
        wrong: The BatchNorms whose pairs are to be unfolded, and why.
    """

    deviation: float
    tolerance: float
    wrong: dict[str, str]


def verify_pairs(
    model: nn.Module,
    pairs: ConvBNPairs,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    recompute_activations: bool = False,
) -> Verification | None:
    """Compare Tune mode with Eval mode on one input, and find the pairs to blame where they differ.

    Two passes without gradients; only if they differ, one more for each pair, and none where all processes have to run
    the forward equally often. Mode, random state and buffers are as before afterwards. The precision is that of the
    surrounding context.

    Args:
        model: Any module.
        pairs: The pairs to verify.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        recompute_activations: Whether Tune mode recomputes activations; as for `set_mode`.

    Returns:
        What was found, or None if the output holds no floating-point tensor to compare.
    """
    expected = _outputs(model, "eval", pairs, inputs, kwargs)
    tolerance = tolerance_of(model, expected)

    def deviation(folded: ConvBNPairs) -> float:
        return deviation_of(_outputs(model, "tune", folded, inputs, kwargs, recompute_activations), expected)

    if not expected:
        return None
    together = deviation(pairs)
    if together <= tolerance:
        return Verification(together, tolerance, {})
    wrong = {}
    for pair in () if communicates(model) else pairs:
        alone = deviation(pairs.unfold({other.bn: "" for other in pairs if other is not pair}))
        if not alone <= tolerance:
            wrong[pair.bn] = reasons.CHANGED_OUTPUT.format(deviation=alone)
    if not wrong or not deviation(pairs.unfold(wrong)) <= tolerance:
        wrong = dict.fromkeys((pair.bn for pair in pairs), reasons.CHANGED_TOGETHER.format(deviation=together))
    return Verification(together, tolerance, wrong)


def _outputs(
    model: nn.Module,
    mode: Mode,
    pairs: ConvBNPairs,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    recompute_activations: bool = False,
) -> list[Tensor]:
    switched = conv_bn_mode(model, mode, pairs=pairs, recompute_activations=recompute_activations)
    with switched, state_kept(model, inputs, kwargs), torch.no_grad():
        return float_tensors(model.forward(*inputs, **kwargs))


def float_tensors(output: Any) -> list[Tensor]:
    """List the floating-point tensors of an output, the numbers that can be compared."""
    return [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def tolerance_of(model: nn.Module, outputs: Sequence[Tensor]) -> float:
    """Say what relative deviation rounding may cause in the precision of a model and the surrounding context."""
    tensors = [*outputs, *(parameter for parameter in model.parameters() if parameter.is_floating_point())]
    dtypes = {tensor.dtype for tensor in tensors}
    dtypes |= {
        torch.get_autocast_dtype(device)
        for device in {tensor.device.type for tensor in tensors}
        if torch.is_autocast_enabled(device)
    }
    tolerance = max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes)
    if torch.backends.cudnn.allow_tf32 and any(tensor.is_cuda for tensor in tensors):
        tolerance = max(tolerance, 10 * TOLERANCES[torch.float32])  # convolutions round their inputs to 10 bits
    return tolerance


def deviation_of(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative deviation of a tensor from what is expected; infinity if shapes differ."""
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        return float("inf")
    return max((_relative(output, other) for output, other in zip(outputs, expected, strict=True)), default=0.0)


def _relative(output: Tensor, expected: Tensor) -> float:
    # What is not finite in both, as a masked score of minus infinity, does not differ.
    same = ~(output.isfinite() | expected.isfinite())
    output, expected = (tensor.to(torch.float64).masked_fill(same, 0.0) for tensor in (output, expected))
    difference = float(torch.linalg.vector_norm(output - expected))
    return difference / max(float(torch.linalg.vector_norm(expected)), 1e-12) if difference else 0.0
