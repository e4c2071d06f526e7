"""The search for the largest batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_convbn.command.largest_batch import largest_batch


@given(per_sample=st.integers(1, 50), constant=st.integers(0, 100), wobble=st.integers(0, 7), room=st.integers(0, 2000))
def test_largest_batch_is_the_largest(per_sample: int, constant: int, wobble: int, room: int) -> None:
    def kept(batch: int) -> int:  # not quite affine, as where an allocation is rounded up
        return constant + per_sample * batch + (batch // 3) * wobble

    expected = 0
    while kept(expected + 1) <= room:
        expected += 1
    assert largest_batch(kept, room) == expected
