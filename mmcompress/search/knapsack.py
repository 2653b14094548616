"""The multiple-choice knapsack: one option of every group, so that the losses add up to least.

Both users are dynamic programmes over a whole number of size units (Sinha and Zoltners 1979). An
allocation removes an exact number of steps; a split stays within a latency budget, cut into bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BUDGET_BINS = 4000
"""Bins: parts of the budget that costs are rounded up to."""


ROUNDING_SLACK = 1e-9
"""Bins: a cost that exceeds a whole bin by less, by rounding alone, is not rounded up."""


@dataclass(frozen=True, kw_only=True)
class _KnapsackTable:
    """The solved subproblems, for every total size from 0 to the capacity."""

    sizes: Sequence[np.ndarray]
    """Size units of each option, one array for each group."""
    options: Sequence[np.ndarray]
    """The option of a group that is best at each total size of the groups up to it."""
    losses: np.ndarray
    """Least summed loss of all groups at each total size; infinite where there is no choice."""

    def trace_options(self, total: int) -> list[int]:
        """Read the choice of every group that has a total size."""
        remaining = total
        choice: list[int] = []
        for sizes, options in zip(reversed(self.sizes), reversed(self.options), strict=True):
            option = int(options[remaining])
            choice.append(option)
            remaining -= int(sizes[option])
        choice.reverse()
        return choice


def _fill_table(
    sizes: Sequence[np.ndarray], losses: Sequence[np.ndarray], *, capacity: int
) -> _KnapsackTable:
    """Solve the knapsack for every total size up to the capacity, group by group."""
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    picks: list[np.ndarray] = []
    for group_sizes, group_losses in zip(sizes, losses, strict=True):
        totals = np.full((len(group_sizes), capacity + 1), np.inf)
        for i, size in enumerate(group_sizes):
            if size <= capacity:
                totals[i, size:] = best[: capacity + 1 - size] + group_losses[i]
        # Of options that are equally good the first one is taken.
        picks.append(totals.argmin(0))
        best = totals.min(0)
    return _KnapsackTable(sizes=sizes, options=picks, losses=best)


def choose_options_at_total(
    sizes: Sequence[np.ndarray], losses: Sequence[np.ndarray], *, total: int
) -> list[int]:
    """Choose one option of every group with the least summed loss at an exact total size.

    Args:
        sizes: Whole size units of each option, one array for each group.
        losses: Loss of each option, in arrays of the same shapes.
        total: Size units of all chosen options together; some choice must have it.

    Returns:
        The index of the chosen option of each group.
    """
    return _fill_table(sizes, losses, capacity=total).trace_options(total)


def choose_options_within_budget(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], *, budget: float
) -> list[int] | None:
    """Choose one option of every group with the least summed loss within a budget.

    Costs are rounded up to whole bins, so a solution never exceeds the budget. Of solutions with
    equal loss the one that costs most is taken: what is not cut can't hurt.

    Args:
        costs: Cost of each option, in the unit of the budget, one array for each group.
        losses: Loss of each option, in arrays of the same shapes.
        budget: The most that all chosen options may cost together.

    Returns:
        The index of the chosen option of each group; None where no choice fits.
    """
    if budget <= 0:
        return None
    sizes: list[np.ndarray] = []
    for cost in costs:
        bins = np.ceil(np.asarray(cost) / budget * BUDGET_BINS - ROUNDING_SLACK)
        sizes.append(bins.astype(int))
    table = _fill_table(sizes, losses, capacity=BUDGET_BINS)
    if not np.isfinite(table.losses).any():
        return None
    largest_total = BUDGET_BINS - int(table.losses[::-1].argmin())
    return table.trace_options(largest_total)
