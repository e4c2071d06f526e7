"""A training that is watched: what it keeps for the backward pass, and that the model is as before when it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.tiny_training import Snapshot, statistics_of
from lightning_convbn import get_mode
from lightning_convbn.memory import count_saved_bytes


class WatchedRun:
    """A model before, in and after a training.

    Attributes:
        losses: The loss of each step.
        modes: The mode in each step.
        kept: Bytes that the forward pass of the first step keeps for the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before, self.statistics = model, Snapshot.of(model), statistics_of(model)
        self.losses: list[float] = []
        self.modes: list[str] = []
        self.kept = 0

    def look(self, model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
        """Look at the model in a step."""
        if not self.modes:
            with torch.random.fork_rng():
                self.kept = count_saved_bytes(model, *inputs, **kwargs)
        self.modes.append(get_mode(model))

    def assert_as_frozen_by_hand(self, frozen: WatchedRun, steps: int, saved: float, tolerance: float = 1e-9) -> None:
        """Losses and weights are those of the other run, less is kept, and the model is as it was before.

        Args:
            frozen: The run with BatchNorms frozen by plain PyTorch.
            steps: How many steps there were.
            saved: At least this share of the bytes is not kept.
            tolerance: How far losses may differ, relative; weights may ten times as far.
        """
        assert self.modes == ["tune"] * steps
        assert frozen.modes == ["train"] * steps
        assert self.losses == pytest.approx(frozen.losses, rel=tolerance)
        assert len(set(self.losses)) == steps
        for name, parameter in self.model.named_parameters():
            expected = frozen.model.get_parameter(name)
            torch.testing.assert_close(parameter, expected, rtol=10 * tolerance, atol=10 * tolerance)
        assert self.kept < (1 - saved) * frozen.kept
        assert Snapshot.of(self.model) == self.before
        for name, buffer in statistics_of(self.model).items():
            assert torch.equal(buffer, self.statistics[name]), name
