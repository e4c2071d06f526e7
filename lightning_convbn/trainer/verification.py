"""The last word on a pair: does the folded model compute on real inputs what Eval mode computes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.exporting.deviation import deviation_of, float_tensors, tolerance_of
from lightning_convbn.layers.swap import Mode
from lightning_convbn.modes import conv_bn_mode
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.find import ConvBNPairs
from lightning_convbn.pairs.fsdp import communicates
from lightning_convbn.pairs.side_effects import state_kept


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
