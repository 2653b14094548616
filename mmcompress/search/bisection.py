"""Bisection over a share: the one way in which cuts and budgets are scaled to a limit."""

from __future__ import annotations

from collections.abc import Callable


def bisect_share(
    is_enough: Callable[[float], bool], *, low: float, high: float, steps: int
) -> tuple[float, float]:
    """Narrow down the smallest share that is enough, by halving an interval.

    Args:
        is_enough: Tells whether a share is enough; true for every larger share as well.
        low: A share that is taken not to be enough.
        high: A share that is taken to be enough. Neither end is tried.
        steps: How many times the interval is halved: one call of `is_enough` each.

    Returns:
        The largest share known not to be enough, and the smallest one known to be.
    """
    for _ in range(steps):
        middle = (low + high) / 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return low, high
