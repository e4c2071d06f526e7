"""Rounds, running out of memory, and what CUDA allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.networks import small_net
from torch import nn

from lightning_convbn import get_mode
from lightning_convbn.command import counting_and_timing
from lightning_convbn.command.counting_and_timing import ModelMeasurer
from lightning_convbn.command.inputs import images


def measurer_of(net: nn.Module, device: str = "cpu") -> ModelMeasurer:
    return ModelMeasurer(net, images(2, (3, 8, 8)), torch.float32, torch.device(device))


def test_rounds_are_interleaved_and_the_first_one_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    net, calls = small_net(), []

    def run_step(model: nn.Module, *_: Any) -> tuple[float, None]:
        calls.append(get_mode(model) if model is net else "deploy-copy")
        return {"eval": 2.0, "tune": 3.0, "deploy-copy": 1.0}[calls[-1]] * (100 if len(calls) <= 3 else 1), None

    monkeypatch.setattr(counting_and_timing, "run_step", run_step)
    found = measurer_of(net).measure(["tune", "deploy-copy"], rounds=3, budget=None)
    assert calls == ["deploy-copy", "tune", "eval", "eval", "tune", "deploy-copy"] * 2
    assert found.variants["tune"].step_seconds == [3.0] * 3
    assert found.step_time_ratio("tune") == (1.5, 1.5, 1.5)
    assert get_mode(net) == "train"


def test_statistics_are_trained_in_train_variants_alone_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(small_net(), nn.Dropout())
    buffers = [(name, buffer, buffer.clone()) for name, buffer in net.named_buffers()]
    seen: list[tuple[bool, bool, float]] = []

    def run_step(model: nn.Module, call: Any, _: Any) -> tuple[float, None]:
        model(*call[0])
        written = any(not torch.equal(now, values) for now, (*_, values) in zip(net.buffers(), buffers, strict=True))
        seen.append((model.training, written, torch.rand(()).item()))
        return 1.0, None

    monkeypatch.setattr(counting_and_timing, "run_step", run_step)
    measurer_of(net).measure(["train-elementwise", "train-blocks", "tune"], rounds=1, budget=None)
    states = [(training, written) for training, written, _ in seen]
    train, other = [(True, True)] * 3, [(False, False)] * 2
    assert states == [*other, *train, *train, *other]
    assert len({drawn for *_, drawn in seen[5:8]}) == 1  # dropout draws alike: after it, so does the next draw
    assert [(name, buffer) for name, buffer in net.named_buffers()] == [(name, buffer) for name, buffer, _ in buffers]
    assert all(torch.equal(buffer, values) for _, buffer, values in buffers)


def test_running_out_of_memory_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()

    def run_step(model: nn.Module, *_: Any) -> tuple[float, None]:
        if model is net and get_mode(model) == "eval":
            raise torch.OutOfMemoryError("out of memory\nand a long story")
        return 1.0, None

    monkeypatch.setattr(counting_and_timing, "run_step", run_step)
    found = measurer_of(net).measure(["tune"], rounds=2, budget=None)
    assert found.notes == ["Eval: not timed, out of memory"]
    assert found.variants["tune"].step_seconds == [1.0, 1.0]
    assert found.step_time_ratio("tune") is None
    assert [variant for variant, _, _ in found.points()] == ["tune"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_allocator_has_a_column_on_cuda() -> None:
    found = measurer_of(small_net(), "cuda").measure(["tune"], rounds=1, budget=None)
    assert all((result.peak_allocated_bytes or 0) > result.saved_bytes for result in found.variants.values())
    assert "peak of the allocator" in found.as_table()[0]
