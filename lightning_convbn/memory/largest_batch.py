"""Finds the largest batch that fits into a number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

FIRST = 8  # the second batch that is counted
FACTOR = 64  # by how much a batch may grow from one count to the next
MOST = 2**24
BISECT_FROM = 12  # counts, from which on the search no longer interpolates


def largest_batch(needed: Callable[[int], int], room: int) -> int | None:
    """Find the largest batch that needs at most ``room`` bytes, by counting.

    The needed bytes are constant for small batches, where the gradients of parameters decide, and then grow by almost
    the same amount for each sample. So the search extrapolates until a batch does not fit, and then interpolates. It
    ends when a batch was counted to fit and the next larger one was counted not to fit.

    Args:
        needed: Batch -> needed bytes.
        room: The number of bytes.

    Returns:
        The batch. 0 if not even one sample fits. None if larger batches need nothing more.

    Example:
        >>> largest_batch(lambda batch: max(70, 10 + 3 * batch), 101)
        30
    """
    needed = cache(needed)
    if needed(1) > room:
        return 0
    before, fits, guess, counts = 1, 1, FIRST, 0
    too_large: int | None = None
    while too_large is None or too_large - fits > 1:
        counts += 1
        if needed(guess) > room:
            too_large = guess
        else:
            before, fits = fits, guess
        if too_large is None:
            if fits >= MOST:
                return None
            grown = needed(fits) - needed(before)
            more = (room - needed(fits)) * (fits - before) // grown if grown > 0 else FACTOR * fits
            guess = fits + min(max(more, 1), FACTOR * fits)
        elif counts < BISECT_FROM:
            share = (room - needed(fits)) / (needed(too_large) - needed(fits))
            guess = min(max(fits + int(share * (too_large - fits)), fits + 1), too_large - 1)
        else:
            guess = (fits + too_large) // 2
    return fits
