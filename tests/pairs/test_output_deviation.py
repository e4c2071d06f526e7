"""How far outputs deviate: by norms, and without copies of everything."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.networks import images

from examples.benchmarks.allocator import peak_by_allocator
from lightning_convbn.pairs.output_deviation import deviation_of


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (100, 3, 2), (0, 3)])
def test_it_is_the_norm_of_the_difference_over_the_norm(shape: tuple[int, ...]) -> None:
    expected = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)
    assert deviation_of([1.25 * expected], [expected]) == pytest.approx(0.25 if math.prod(shape) else 0)
    assert deviation_of([expected], [expected]) == 0


def test_what_is_infinite_in_both_is_equal() -> None:
    expected = torch.tensor([[1.0, -math.inf], [2.0, 3.0]])
    assert deviation_of([expected], [expected]) == 0
    assert deviation_of([torch.ones(2, 2)], [expected]) == math.inf or math.isnan(
        deviation_of([torch.ones(2, 2)], [expected])
    )


def test_comparing_takes_less_than_one_of_the_two() -> None:
    """A step under a memory budget has no room for copies of the largest output."""
    output, expected = images(64, 3, 32, 32), images(64, 3, 32, 32, seed=1)
    assert peak_by_allocator(lambda: deviation_of([output], [expected])) < 0.5 * output.nbytes
