"""Finds the largest batch that fits into a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache


def largest_batch(kept: Callable[[int], int], room: int) -> int | None:
    """Find the largest batch that keeps at most ``room`` bytes, by counting.

    The kept bytes grow with the batch, by almost the same amount for each sample. So the first guess, from batch 1 and
    batch 2, is close. The search ends when a batch was counted to fit and the next larger one was counted not to fit.

    Args:
        kept: Batch -> kept bytes.
        room: The number of bytes.

    Returns:
        The batch. 0 if not even one sample fits. None if a larger batch keeps nothing more.

    Example:
        >>> largest_batch(lambda batch: 10 + 3 * batch, 101)
        30
    """
    kept = cache(kept)
    if kept(1) > room:
        return 0
    per_sample = kept(2) - kept(1)
    if per_sample <= 0:
        return None
    fits, too_large, step = 1, math.inf, 1
    guess = max(2, 1 + (room - kept(1)) // per_sample)
    while too_large - fits > 1:
        if kept(guess) <= room:
            fits = guess
            guess = fits + step
        else:
            too_large = guess
            guess = guess - step
        if not fits < guess < too_large:
            guess = int(fits + too_large) // 2
        step *= 2
    return fits
