"""What looks at a model runs its shadow: the model, its hooks and its inputs notice nothing."""

from __future__ import annotations

import logging
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.networks import Net, images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_convbn import get_mode, measure_memory, set_mode
from lightning_convbn.memory import measure_memory_abstractly
from lightning_convbn.pairs.find import find_conv_bn_pairs, find_recorded_pairs, pairs_in_force
from lightning_convbn.pairs.shadow import Shadow

IMAGE = images(2, 3, 8, 8)
LOOKS: dict[str, Callable[[nn.Module, Any], object]] = {
    "trace": lambda model, inputs: find_conv_bn_pairs(model),
    "record": lambda model, inputs: find_recorded_pairs(model, inputs, {}),
    "count": lambda model, inputs: measure_memory(model, *inputs, mode="tune"),
    "count without data": lambda model, inputs: measure_memory_abstractly(model, inputs, {}, mode="eval"),
}


class State:
    def __init__(self) -> None:
        self.steps = 0


class Pair(NamedTuple):
    first: Any
    second: Any


class Busy(nn.Module):
    """Its forward leaves traces wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("count", torch.zeros(1))
        self.calls, self.bank, self.by_name = 0, [], defaultdict(list)
        self.state, self.random, self.pair = State(), random.Random(0), Pair([], {})
        self.generator = torch.Generator().manual_seed(0)
        self.lock = threading.Lock()
        self.head = self.normalise
        self.last: Tensor | None = None
        self.total, self.array, self.numbers = torch.zeros(1), np.zeros(2), np.random.default_rng(0)
        self.log = logging.getLogger("convbn-test")

    def normalise(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.bn(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(1).div_(2)
        self.count += 1  # type: ignore[misc]
        self.state.steps += 1
        self.total += 1
        self.array[0] += self.numbers.random()
        self.pair.first.append(1)
        self.pair.second["a"] = 1
        self.random.random()
        random.random()
        noise = torch.rand(1, generator=self.generator) + torch.rand(1)
        self.last = self.head(self.conv(x))
        self.bank.append(self.last)
        self.by_name["a"].append(self.last)
        return torch.stack(self.bank).mean(0) + 0 * noise


def traces(model: Busy) -> list[Any]:
    return [
        model.calls,
        model.count.clone(),
        len(model.bank),
        dict(model.by_name),
        model.state.steps,
        model.pair,
        model.random.getstate(),
        model.total.clone(),
        model.array.copy(),
        hash(str(model.numbers.bit_generator.state)),
        [id(handler) for handler in model.log.handlers],
        model.generator.get_state(),
        model.last,
        random.getstate(),
        torch.get_rng_state(),
        [buffer.clone() for buffer in model.buffers()],
        [hash(tuple(vars(module))) for module in model.modules()],
    ]


@pytest.mark.parametrize("look", LOOKS)
def test_nobody_can_tell_that_somebody_has_looked(look: str) -> None:
    model, seen = Busy(), []
    model.conv.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    set_mode(model, "tune")
    image, before, modules = IMAGE.clone(), traces(model), dict(model.named_modules())
    LOOKS[look](model, (image,))
    assert not seen
    assert torch.equal(image, IMAGE)
    torch.testing.assert_close(traces(model), before, rtol=0, atol=0)
    assert dict(model.named_modules()) == modules


def test_a_list_of_the_callers_is_left_alone() -> None:
    """Video networks of two paths write into it."""

    def two_paths(net: Net, paths: list[Tensor]) -> Tensor:
        for index, block in enumerate((net.first, net.second)):
            paths[index] = block(paths[index])
        return paths[0] + paths[1]

    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) for _ in range(2)]
    model, paths = Net(two_paths, first=blocks[0], second=blocks[1]).eval(), [IMAGE, IMAGE + 1]
    given = list(paths)
    assert len(find_conv_bn_pairs(model, example_inputs=(paths,))) == 2
    measure_memory(model, paths, mode="tune")
    measure_memory_abstractly(model, (paths,), {}, mode="tune")
    assert all(one is other for one, other in zip(paths, given, strict=True))


def test_a_shadow_of_a_converted_model_is_converted_and_its_pairs_are_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    set_mode(model, "tune")
    shadow: Any = Shadow(model).model
    assert type(shadow[0]) is type(model[0])
    assert [*pairs_in_force(shadow)] == [("0", "1")]  # type: ignore[misc]
    set_mode(shadow, "train")
    assert get_mode(model) == "tune"


def test_lazy_modules_stay_lazy() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    pairs = find_conv_bn_pairs(model, example_inputs=(IMAGE,))
    assert "lazy" in pairs.unpaired["1"]
    model(IMAGE)
    assert model[0].in_channels == 3


@pytest.mark.parametrize("in_place", [True, False])
def test_a_shadow_of_a_compiled_part_does_not_run_the_original(in_place: bool) -> None:
    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if in_place:
        part.compile(backend="eager")
    model = nn.Sequential(part if in_place else torch.compile(part, backend="eager"), nn.ReLU())  # type: ignore[arg-type]
    seen: list[Any] = []
    part.register_forward_hook(lambda module, args, output: seen.append(output))
    assert len(find_conv_bn_pairs(model, example_inputs=(IMAGE,))) == 1
    measure_memory_abstractly(model, (IMAGE,), {}, mode="tune")
    assert not seen


def test_a_hook_that_is_a_method_of_the_model_runs_in_the_shadow() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.seen = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), []
            self.conv.register_forward_hook(self.keep)

        def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.seen.append(output)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.bn(self.conv(x))
            return output + self.seen.pop()

    model = Peeks()
    assert "is also used by" in find_recorded_pairs(model, (IMAGE,), {}).unpaired["bn"]
    assert measure_memory(model, IMAGE, mode="eval").saved_bytes > 0
    assert model.seen == []


@pytest.mark.parametrize("look", ["trace", "record"])
def test_a_reentrant_checkpoint_is_a_use_of_what_it_is_given(look: str) -> None:
    """Its backward pass runs the BatchNorm again, on a tensor without a graph: no fold can go over that border."""

    def crossed(net: Net, x: Tensor) -> Any:
        return checkpoint(net.bn, net.conv(x), use_reentrant=True)

    model = Net(crossed, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    pairs = find_conv_bn_pairs(model, example_inputs=None if look == "trace" else (IMAGE,))
    assert "use_reentrant=True" in pairs.unpaired["bn"]
