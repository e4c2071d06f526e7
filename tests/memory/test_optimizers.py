"""What an optimizer needs: compared with what PyTorch's own optimizers allocate."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.networks import images, small_net
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from examples.benchmarks.allocator import peak_by_allocator
from lightning_convbn import measure_memory
from lightning_convbn.memory.optimizers import bytes_of_optimizers, optimizer_bytes

FLOAT = 4
REAL: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters),
}


def parameters() -> list[Tensor]:
    return [torch.zeros(1000, requires_grad=True), torch.zeros(20, 30, requires_grad=True)]


class TestByHand:
    def test_sgd_has_a_momentum_for_each_parameter(self) -> None:
        assert optimizer_bytes(parameters(), "sgd") == (1600 * FLOAT, 0)

    def test_adamw_has_two_and_the_temporary_tensors_of_two_parameters(self) -> None:
        """The denominator of the first one is there until that of the second one is."""
        assert optimizer_bytes(parameters(), "adamw") == (2 * 1600 * FLOAT, (1000 + 2 * 600) * FLOAT)

    def test_on_a_device_adamw_handles_all_parameters_at_once(self) -> None:
        with FakeTensorMode():
            on_device = [torch.empty(parameter.shape, device="cuda") for parameter in parameters()]
        assert optimizer_bytes(on_device, "adamw").temporary == 1600 * FLOAT


@pytest.mark.parametrize("name", REAL)
def test_state_and_step_are_those_of_pytorch(name: Any) -> None:
    model = nn.ParameterList([torch.zeros(100_000), torch.zeros(20, 30)])
    for parameter in model:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = REAL[name](model.parameters())
    optimizer.step()
    held = {id(value): value.nbytes for state in optimizer.state.values() for value in state.values()}
    state, temporary = optimizer_bytes([*model.parameters()], name)
    assert state == pytest.approx(sum(held.values()), abs=4 * 2)  # AdamW has a counter for each parameter, too
    if temporary:
        assert peak_by_allocator(optimizer.step) == pytest.approx(temporary, abs=2000)  # and some scalars


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("width", [8, 400])
def test_the_peak_of_a_later_step_agrees_with_the_allocator(name: Any, width: int) -> None:
    """Of small images the optimizer's step decides, of large ones the passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3)).eval()
    batch = images(2, 3, 8, width)

    def later_step() -> object:
        """As Lightning does it: the gradients of the step before are freed after the forward pass."""
        twin = torch.nn.Sequential(*[type(module)(*arguments) for module, arguments in zip(model, LAYERS, strict=True)])
        twin.load_state_dict(model.state_dict())
        optimizer = REAL[name](twin.eval().parameters())
        given = batch.clone()
        for _ in range(2):
            loss = twin(given).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return twin, optimizer, given

    gc.collect()
    later_step()
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    seen = peak_by_allocator(later_step, count_workspaces=False) - own
    counted = measure_memory(model, batch, mode="eval", optimizer=name).peak_bytes
    assert counted == pytest.approx(seen, rel=0.03)
    assert counted > measure_memory(model, batch, mode="eval").peak_bytes  # type: ignore[operator]


LAYERS: list[tuple[int, ...]] = [(3, 64, 3), (64,), (64, 64, 3)]


class TestRealOptimizers:
    @pytest.mark.parametrize(
        ("make", "copies"),
        [
            (lambda parameters: torch.optim.SGD(parameters, lr=0.1), 0),
            (lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(0.1), momentum=0.9), 1),
            (lambda parameters: torch.optim.RMSprop(parameters), 1),
            (lambda parameters: torch.optim.Adam([{"params": [parameter]} for parameter in parameters]), 2),
            (lambda parameters: torch.optim.Adam(parameters, amsgrad=True), 3),
        ],
    )
    def test_each_is_counted_as_it_is(self, make: Any, copies: int) -> None:
        optimizer = make(parameters())
        needs, unknown = bytes_of_optimizers([optimizer])
        assert (unknown, len(optimizer.state)) == ([], 0)
        assert needs.state == pytest.approx(copies * 1600 * FLOAT, abs=16)  # and counters

    def test_frozen_parameters_need_nothing(self) -> None:
        trained, frozen = parameters()
        frozen.requires_grad_(False)
        assert bytes_of_optimizers([torch.optim.Adam([trained, frozen])])[0].state == pytest.approx(8000, abs=16)

    def test_a_state_that_is_there_counts(self) -> None:
        """A parameter that wants no gradient at this moment may have one."""
        trained, frozen = parameters()
        optimizer = torch.optim.Adam([trained, frozen])
        for parameter in (trained, frozen):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        frozen.requires_grad_(False)
        assert bytes_of_optimizers([optimizer])[0].state == pytest.approx(2 * 1600 * FLOAT, abs=16)

    def test_what_can_not_step_without_data_counts_as_adamw(self) -> None:
        needs, unknown = bytes_of_optimizers([torch.optim.LBFGS(parameters()), torch.optim.SGD(parameters())])
        assert unknown == ["LBFGS"]
        assert needs == optimizer_bytes(parameters(), "adamw")


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer='adam' is unknown; it must be one of 'none', 'sgd', 'adamw'"):
        measure_memory(small_net(), images(2, 3, 8, 8), mode="tune", optimizer="adam")  # type: ignore[arg-type]
