"""A memory budget: the least recomputation is chosen whose step fits, and the step fits indeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.blocks import Tower, batch
from helpers.networks import images, random_model
from helpers.torch_settings import one_thread
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from examples.benchmarks.allocator import peak_by_allocator
from lightning_convbn import (
    MemoryPlan,
    Recompute,
    fit_memory_budget,
    get_mode,
    measure_memory,
    recomputed_blocks,
    set_mode,
)
from lightning_convbn.blocks.find import find_blocks, recompute_of
from lightning_convbn.memory import OPTIMIZERS, forward_and_backward
from lightning_convbn.memory.budget import bytes_on, fixed_bytes, size_in_bytes
from lightning_convbn.memory.plan import most_of

NETWORKS = (
    "mobilenet_v3_large",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("efficientnet_b0", "mobilenet_v2")),
)


def inputs() -> Tensor:
    return images(4, 3, 64, 64)


def needed(model: nn.Module, recompute: Recompute | Sequence[str], **options: Any) -> int:
    """What a step takes, by a count that makes no plan."""
    peak = measure_memory(model, inputs(), mode="tune", recompute=recompute, **options).peak_bytes
    assert peak is not None
    return fixed_bytes(model) + peak


def gradients(model: nn.Module) -> tuple[Tensor, ...]:
    with one_thread():
        return torch.autograd.grad(model(inputs()).sum(), [*model.parameters()])


def plan_for(model: nn.Module, budget: int, **options: Any) -> MemoryPlan:
    return fit_memory_budget(model, inputs(), memory_budget=budget, **options)


@pytest.mark.parametrize("name", NETWORKS)
class TestLevels:
    def test_nothing_is_recomputed_where_all_fits(self, name: str) -> None:
        model = random_model(name)
        budget = needed(model, "none")
        plan = plan_for(model, budget)
        assert (plan.recompute, plan.peak_bytes, plan.fits) == ("none", budget, True)
        assert recompute_of(model) == "none"
        assert get_mode(model) == "tune"

    def test_elementwise_comes_next(self, name: str) -> None:
        model = random_model(name)
        budget = needed(model, "none") - 1
        plan = plan_for(model, budget)
        assert (plan.recompute, plan.fits) == ("elementwise", True)
        assert plan.peak_bytes == needed(model, "elementwise") < budget
        assert recompute_of(model) == "elementwise"

    def test_then_as_few_blocks_as_needed(self, name: str) -> None:
        """One block less of the chosen ones does not fit, and the step itself takes what was predicted."""
        model = random_model(name)
        every = find_blocks(model, set_mode(model, "tune")).names
        budget = (needed(model, "elementwise") + needed(model, every)) // 2
        plan = plan_for(model, budget)
        assert plan.fits
        assert 0 < len(plan.recompute) < len(every)
        assert set(recomputed_blocks(model).names) == set(plan.recompute)
        assert needed(model, plan.recompute) == plan.peak_bytes
        assert needed(model, plan.recompute[:-1] or "elementwise") > budget
        set_mode(model, "tune", recompute=plan.recompute)
        given = inputs()
        seen = peak_by_allocator(lambda: forward_and_backward(model, (given.clone(),), {}), count_workspaces=False)
        assert seen == pytest.approx(plan.peak_bytes - fixed_bytes(model), rel=0.03)

    def test_if_nothing_fits_the_plan_says_what_would(self, name: str) -> None:
        model = random_model(name)
        least = needed(model, find_blocks(model, set_mode(model, "tune")).names)
        plan = plan_for(model, least - (least - fixed_bytes(model)) // 8)
        assert not plan.fits
        assert plan.peak_bytes <= least
        assert plan.largest_batch in (1, 2, 3)

        def peak(batch: int) -> int:
            use = measure_memory(model, inputs()[:batch], mode="tune", recompute=plan.recompute)
            assert use.peak_bytes is not None
            return fixed_bytes(model) + use.peak_bytes

        assert peak(plan.largest_batch) <= plan.budget_bytes < peak(plan.largest_batch + 1)


def test_the_numbers_are_those_without_recomputation() -> None:
    model = random_model("mobilenet_v2")
    every = find_blocks(model, set_mode(model, "tune")).names
    expected = gradients(model)
    budget = (needed(model, "elementwise") + needed(model, every)) // 2
    assert plan_for(model, budget).fits
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))


def test_blocks_that_save_more_for_an_operation_come_first() -> None:
    """In a ResNet all blocks have about as many operations, and the first ones keep most."""
    model = random_model("resnet50")
    every = find_blocks(model, set_mode(model, "tune")).names
    plan = plan_for(model, (needed(model, "elementwise") + needed(model, every)) // 2)
    assert all(name.startswith(("layer1", "layer2")) for name in plan.recompute)


def test_the_optimizer_is_in_the_plan() -> None:
    model = random_model("resnet18")
    peaks = [plan_for(model, 2**40, optimizer=optimizer).peak_bytes for optimizer in OPTIMIZERS]
    assert peaks == [needed(model, "none", optimizer=optimizer) for optimizer in OPTIMIZERS]
    assert peaks == sorted(set(peaks))


def test_a_batch_norm_that_sees_one_value_is_no_obstacle() -> None:
    """In Train mode it could not run; in the mode that is planned for it can."""

    class Pooled(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

        def run(self, block: nn.Module, input: Tensor) -> Tensor:
            return super().run(block, input) + self.pooled(input)

    model = Pooled().train()
    plan = fit_memory_budget(model, images(1, 3, 32, 32), memory_budget=fixed_bytes(model) + 40_000)
    assert isinstance(plan.recompute, tuple)


@pytest.mark.parametrize(
    ("one", "other", "most"),
    [
        ("none", "none", "none"),
        ("none", "elementwise", "elementwise"),
        ("elementwise", ("a",), ("a",)),
        (("a", "b"), ("b", "c"), ("a", "b", "c")),
        ("blocks", ("a",), "blocks"),
        ("none", (), "elementwise"),
    ],
)
def test_what_recomputes_most(one: Any, other: Any, most: Any) -> None:
    assert most_of(one, other) == most
    assert set(most_of(other, one)) == set(most)


@pytest.mark.parametrize(("fraction", "left"), [(1.0, 100_000 + 20_000), (1e-4, 100_000)])
def test_auto_is_what_the_device_has_left_for_this_process(
    monkeypatch: pytest.MonkeyPatch, fraction: float, left: int
) -> None:
    """A tenth of it stays free. What others have allocated is not there; what the plan counts is.

    A process may be limited to a fraction of the device.
    """
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        held = [torch.empty(1000, device=device), torch.empty(10, device="cpu")]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4000 + 5000)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    assert bytes_on(device, "auto", held) == pytest.approx(0.9 * (left - 5000), abs=1)


class TakesSeveral(nn.Module):
    """Takes images in a list, and a table of other things by name."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()

    def forward(self, images: list[Tensor], *, more: dict[str, Tensor]) -> Tensor:
        return self.tower(torch.stack(images)) + more["offset"].sum()  # type: ignore[no-any-return]


def test_inputs_may_be_nested_and_then_no_batch_is_proposed() -> None:
    model = TakesSeveral()
    arguments: Any = list(batch()), {"offset": torch.ones(7)}
    plan = fit_memory_budget(model, arguments[0], memory_budget=fixed_bytes(model) + 1, more=arguments[1])
    assert not plan.fits
    assert plan.largest_batch is None


class TestBadInput:
    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ("8 apples", "memory_budget='8 apples' is no amount of memory, as 8GiB, 500MiB or 24GB, nor 'auto'"),
            ("0GiB", "memory_budget='0GiB' is no amount of memory"),
            (0, "memory_budget=0 is no whole number of bytes; give one, or a text such as '8GiB'"),
            (8.5, "memory_budget=8.5 is no whole number of bytes"),
            ("auto", "memory_budget='auto' needs a CUDA device, and the model is on 'cpu'; give an amount, as '8GiB'"),
            (
                100,
                r"memory_budget: 0.000 MiB can't hold the parameters and buffers of Tower; give more than 0.0",
            ),
        ],
    )
    def test_a_budget_that_is_none_is_refused(self, budget: Any, message: str) -> None:
        model = Tower()
        with pytest.raises(ValueError, match=message):
            fit_memory_budget(model, batch(), memory_budget=budget)
        assert get_mode(model) == "train"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "deploy"}, "mode must be one of 'train', 'eval', 'tune'; got 'deploy'"),
            ({"optimizer": "adam"}, "optimizer='adam' is unknown"),
        ],
    )
    def test_other_arguments_are_checked(self, options: Any, message: str) -> None:
        model = Tower()
        with pytest.raises(ValueError, match=message):
            fit_memory_budget(model, batch(), memory_budget="1GiB", **options)
        assert get_mode(model) == "train"

    def test_a_model_that_looks_at_values_is_refused(self) -> None:
        class LooksAtValues(Tower):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * float(input.mean())

        model = LooksAtValues()
        with pytest.raises(ValueError, match=r"can't be planned for, because it can't run on tensors without data"):
            fit_memory_budget(model, batch(), memory_budget="1GiB")
        assert get_mode(model) == "train"


@pytest.mark.parametrize(
    ("amount", "size"),
    [
        *((amount, 8 * 2**30) for amount in ("8GiB", "8 GiB", "8G", "8g", "8Gi")),
        *((amount, 512 * 10**6) for amount in ("512MB", "512 mb")),
        ("512M", 512 * 2**20),
        ("1.5KiB", 1536),
        (" 2TB ", 2 * 10**12),
    ],
)
def test_amounts(amount: str, size: int) -> None:
    assert size_in_bytes(amount) == size
