"""What is computed again in the backward pass: the same bits as what is kept, and no more bytes than without it."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from fuzz.checks import norms_of
from fuzz.network import Action, Scenario, steps_of
from fuzz.operations import ONCE
from fuzz.outcomes import Outcome, Wrong, arguments_of, autocast, draw_inputs, forget, kind_of, run
from torch import Tensor, nn

from lightning_convbn import Recompute, set_mode
from lightning_convbn.memory import count_saved_bytes
from lightning_convbn.pairs.find import pairs_in_force

LEVELS: Sequence[Recompute] = ("none", "elementwise")


def compare_recomputation(model: nn.Module, mode: Any, scenario: Scenario, action: Action) -> None:
    """Raise `Wrong` if recomputation changes a bit of one pass, or keeps more for the backward pass."""
    plain, recomputing = (copy_in_mode(model, mode, level) for level in LEVELS)
    if plain is None or recomputing is None:
        return
    ONCE.update(norms_of(plain).values())
    kept = [kept_bytes(one, scenario, action) for one in (plain, recomputing)]
    # What no hook of ours sees keeps by itself the output of a ReLU, beside our one bit for each of its values.
    bits = kept[0] // 8 if any(step.op == "unseen" for step in steps_of(scenario.network)) else 0
    if kept[1] > kept[0] + bits:
        raise Wrong("recomputation", f"keeps {kept[1]} bytes in the place of {kept[0]}")
    expected = run(plain, scenario, action)
    compare_bits(run(recomputing, scenario, action), expected)


def copy_in_mode(model: nn.Module, mode: Any, recompute: Recompute) -> nn.Module | None:
    """Return a copy of a model in a mode; None if it can't be copied, or has no BatchNorm any more."""
    if not norms_of(model):
        return None
    forget(model)  # tensors of a graph can't be copied
    try:
        copied = copy.deepcopy(model)
    except Exception:
        return None
    set_mode(copied, mode, pairs=pairs_in_force(model), recompute=recompute)
    return copied


def kept_bytes(model: nn.Module, scenario: Scenario, action: Action) -> int:
    """Count what one pass keeps for the backward pass."""

    def forward(*arguments: Any) -> Any:
        torch.manual_seed(scenario.seed)
        random.seed(scenario.seed)
        output = model(*arguments, action.domain)
        forget(model)
        return output

    _, given = draw_inputs(scenario, action)
    with autocast(scenario):
        return count_saved_bytes(forward, *arguments_of(scenario, given))


def compare_bits(outcome: Outcome, expected: Outcome) -> None:
    """Raise `Wrong` if anything differs, by one bit. What was logged while bytes were counted is the same, too."""
    for name, wanted in expected.items():
        value = outcome.get(name)
        same = torch.equal(value, wanted) if isinstance(wanted, Tensor) and isinstance(value, Tensor) else True
        if not same or isinstance(wanted, Tensor) is not isinstance(value, Tensor):
            raise Wrong("recomputation", f"{kind_of(name)} is not the same to the bit: {name}")
