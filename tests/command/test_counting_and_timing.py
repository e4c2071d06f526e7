"""Rounds, running out of memory, and the sections of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.networks import small_net
from torch import nn

from lightning_convbn import get_mode
from lightning_convbn.command import counting_and_timing
from lightning_convbn.command.counting_and_timing import ModelMeasurer, count_progress_steps
from lightning_convbn.command.inputs import Inputs, TensorInput


class TestModelMeasurer:
    def test_rounds_are_interleaved_and_the_first_one_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net, calls = small_net(), []

        def timed(model: nn.Module, *_: Any) -> float:
            calls.append(get_mode(model) if model is net else "deploy-copy")
            return {"eval": 2.0, "tune": 3.0, "deploy-copy": 1.0}[calls[-1]] * (100 if len(calls) <= 3 else 1)

        monkeypatch.setattr(counting_and_timing, "step_seconds", timed)
        measurer = ModelMeasurer(net, Inputs((TensorInput((2, 3, 8, 8)),)), torch.float32, torch.device("cpu"))
        steps: list[str] = []
        found = measurer.measure(["tune", "deploy-copy"], rounds=3, budget=None, progress=steps.append)
        assert calls == ["deploy-copy", "tune", "eval", "eval", "tune", "deploy-copy"] * 2
        assert found.variants["tune"].step_seconds == [3.0] * 3
        assert found.step_time_ratio("tune") == (1.5, 1.5, 1.5)
        assert len(steps) == count_progress_steps(["tune", "deploy-copy"], rounds=3, budget=None)
        assert get_mode(net) == "train"

    def test_running_out_of_memory_is_noted_and_the_others_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net = small_net()

        def timed(model: nn.Module, *_: Any) -> float:
            if model is net and get_mode(model) == "eval":
                raise torch.OutOfMemoryError("out of memory\nand a long story")
            return 1.0

        monkeypatch.setattr(counting_and_timing, "step_seconds", timed)
        measurer = ModelMeasurer(net, Inputs((TensorInput((2, 3, 8, 8)),)), torch.float32, torch.device("cpu"))
        found = measurer.measure(["tune"], rounds=2, budget=None, progress=lambda step: None)
        assert found.notes == ["Eval: not timed, out of memory"]
        assert found.variants["tune"].step_seconds == [1.0, 1.0]
        assert found.step_time_ratio("tune") is None

    def test_a_section_with_more_than_half_of_the_bytes_is_divided(self) -> None:
        heavy = nn.Sequential(small_net(), nn.Sequential(nn.Flatten(), nn.Linear(4, 4)))
        measurer = ModelMeasurer(heavy, Inputs((TensorInput((2, 3, 8, 8)),)), torch.float32, torch.device("cpu"))
        found = measurer.measure(["eval"], rounds=0, budget=None, progress=lambda step: None)
        assert {block.section for block in found.blocks} >= {"(input)", "0.0", "0.4"}
