"""Checks pairs on real inputs: does the folded model compute what Eval mode computes?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.layers.swap import Mode
from lightning_convbn.modes import conv_bn_mode
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.output_deviation import deviation_of, float_tensors, tolerance_of
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.side_effects import side_effects_undone
from lightning_convbn.trainer.processes import communicates


@dataclass(frozen=True)
class Verification:
    """What `verify_pairs` has found.

    Attributes:
        deviation: The largest relative deviation of an output tensor in Tune mode, all pairs folded, from Eval mode.
        tolerance: The relative deviation that rounding may cause in the precision of the model.
        wrong: The BatchNorms that must not be folded: qualified name -> why.
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
    """Compare Tune mode with Eval mode on one input. If they differ, find the pairs that cause it.

    This takes two forward passes without gradients. If their outputs differ, each pair takes one more, except where all
    processes must run the forward equally often: there all pairs count as wrong. Afterwards the mode is as before, and
    the side effects of the passes are undone. Set the precision, autocast for instance, around the call.

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
    if not expected:
        return None
    tolerance = tolerance_of(model, expected)

    def deviation(folded: ConvBNPairs) -> float:
        return deviation_of(_outputs(model, "tune", folded, inputs, kwargs, recompute_activations), expected)

    together = deviation(pairs)
    if together <= tolerance:
        return Verification(together, tolerance, {})
    wrong = {} if communicates(model) else _wrong_alone(pairs, deviation, tolerance)
    if not wrong or not deviation(pairs.unfold(wrong)) <= tolerance:
        wrong = dict.fromkeys((pair.bn for pair in pairs), reasons.CHANGED_TOGETHER.format(deviation=together))
    return Verification(together, tolerance, wrong)


def _wrong_alone(pairs: ConvBNPairs, deviation: Callable[[ConvBNPairs], float], tolerance: float) -> dict[str, str]:
    """Fold one pair at a time, and return the BatchNorms of those that change the output -> why."""
    wrong = {}
    for pair in pairs:
        alone = deviation(pairs.unfold({other.bn: "" for other in pairs if other is not pair}))
        if not alone <= tolerance:  # written like this, NaN counts as a change
            wrong[pair.bn] = reasons.CHANGED_OUTPUT.format(deviation=alone)
    return wrong


def _outputs(
    model: nn.Module,
    mode: Mode,
    pairs: ConvBNPairs,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    recompute_activations: bool = False,
) -> list[Tensor]:
    switched = conv_bn_mode(model, mode, pairs=pairs, recompute_activations=recompute_activations)
    with switched, side_effects_undone(model, inputs, kwargs), torch.no_grad():
        return float_tensors(model.forward(*inputs, **kwargs))
