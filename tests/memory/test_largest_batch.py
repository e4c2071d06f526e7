"""The search for the largest batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_convbn.memory.largest_batch import largest_batch


@given(
    flat=st.integers(0, 3000),
    per_sample=st.integers(1, 50),
    constant=st.integers(0, 100),
    wobble=st.integers(0, 7),
    room=st.integers(0, 2000),
)
def test_largest_batch_is_the_largest(flat: int, per_sample: int, constant: int, wobble: int, room: int) -> None:
    def needed(batch: int) -> int:  # not quite affine, as where an allocation is rounded up
        return max(flat, constant + per_sample * batch + (batch // 3) * wobble)  # gradients are as large in any batch

    expected = 0
    while needed(expected + 1) <= room:
        expected += 1
    assert largest_batch(needed, room) == expected


def test_few_batches_are_counted() -> None:
    counted: list[int] = []

    def needed(batch: int) -> int:
        counted.append(batch)
        return max(10**8, 10**7 + 8 * 10**6 * batch)

    assert largest_batch(needed, 8 * 10**9) == (8 * 10**9 - 10**7) // (8 * 10**6)
    assert len(counted) <= 6


def test_a_batch_that_takes_nothing_more_has_no_largest() -> None:
    assert largest_batch(lambda batch: 5, 5) is None
