"""The largest whole number whose cost stays below a limit, in few evaluations of an expensive cost."""

from __future__ import annotations

import functools
from collections.abc import Callable

HIGHEST = 2**20


def largest_that_fits(cost: Callable[[int], float], limit: float, *, highest: int = HIGHEST) -> int:
    """The largest n in [1, highest] with ``cost(n) <= limit``, or 0.

    The cost must not fall as n grows. Bytes are almost affine in batch and rank, so a straight line through two known
    points guesses well; every guess is evaluated, and the bracket closes on the answer whatever the shape.

    Example:
        >>> largest_that_fits(lambda n: 100 + 7 * n, 1000)
        128
    """
    cost = functools.cache(cost)
    if cost(1) > limit:
        return 0
    low, high = 1, 2  # low fits; high is the next to try and, once it did not fit, the upper bound
    while cost(high) <= limit:
        low = high
        if low == highest:
            return highest
        high = min(highest, max(2 * low, _guess(cost, low // 2 or 1, low, limit) + 1))
    while high - low > 1:
        middle = min(max(_guess(cost, low, high, limit), low + 1), high - 1)
        if cost(middle) <= limit:
            # A guess that is right has its neighbour just above the limit.
            low, high = (middle, middle + 1) if cost(min(middle + 1, high)) > limit else (middle + 1, high)
        else:
            high = middle
            if high - low > 1 and cost(middle - 1) <= limit:
                low = middle - 1
    return low


def _guess(cost: Callable[[int], float], low: int, high: int, limit: float) -> int:
    """Where the straight line through two points reaches the limit."""
    if low == high:
        return high
    slope = (cost(high) - cost(low)) / (high - low)
    return HIGHEST if slope <= 0 else min(HIGHEST, int(low + (limit - cost(low)) / slope))
