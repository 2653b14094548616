"""Repair of a candidate: to the budget, to the blocks it may drop, and to the protection.

Every step is greedy: the best ratio of estimated loss to predicted milliseconds goes first. All
functions are pure and run without torch. `loss_increase` is the estimate for single cuts,
`rounding` the loss increase by node and precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmcompress.graph.structure import Candidate
from mmcompress.search.problem import (
    LossIncrease,
    SearchProblem,
    complete_candidate,
    replace_precision,
    replace_units,
)

Rounding = Mapping[str, Mapping[str, float]]
"""Loss increase of rounding a whole node, by node and precision."""


COARSE_STEP_DIVISOR = 16
"""A coarse step changes at least a 16th of a block's units, so that large blocks take few steps."""


MIN_SAVED_MS = 1e-6
"""Milliseconds: a change that saves or adds less counts as none, and divides nothing."""


MIN_CUT_LOSS = 1e-6
"""Loss: what a cut is taken to cost at least; of cuts that cost nothing the one that saves most
goes first."""


MIN_GROWTH_LOSS = 1e-9
"""Loss: what a step up is taken to undo at least; of steps that undo nothing the cheapest goes
first."""


MIN_EXCESS_UNDONE = 1e-12
"""Share of units: a step that undoes less of the protection's excess is rounding alone."""


@dataclass(frozen=True, kw_only=True)
class _Growth:
    """A step up: one block with more units."""

    node_name: str
    """Node of the block."""
    block_name: str
    """Block that gets more units."""
    units: int
    """Units kept after the step."""


def cut_to_budget(
    problem: SearchProblem, candidate: Candidate, *, loss_increase: LossIncrease
) -> Candidate | None:
    """Cut a candidate down to the budget, always where a saved millisecond costs least.

    Args:
        problem: Budget, units that blocks may keep, and limits.
        candidate: Where to start; returned complete and otherwise as it is when it fits.
        loss_increase: Estimate for single cuts.

    Returns:
        A candidate within the budget; None where no allowed cut saves time any more.
    """
    current = complete_candidate(problem, candidate)
    latency_ms = problem.predict(current)
    while latency_ms > problem.budget_ms:
        smaller = None
        # Coarse cuts take few predictions. Fine ones cut what coarse ones leave of a block.
        for coarse in (True, False):
            if smaller is None:
                smaller = _find_cheapest_cut(
                    problem,
                    current,
                    latency_ms=latency_ms,
                    loss_increase=loss_increase,
                    coarse=coarse,
                )
        if smaller is None:
            return None
        current = smaller
        latency_ms = problem.predict(current)
    return current


def _find_cheapest_cut(
    problem: SearchProblem,
    current: Candidate,
    *,
    latency_ms: float,
    loss_increase: LossIncrease,
    coarse: bool,
) -> Candidate | None:
    """Find the cut of one block that costs least loss per saved millisecond."""
    best_price = math.inf
    best: Candidate | None = None
    for node_name, blocks in problem.blocks.items():
        for block in blocks:
            kept_units = current.kept_units[node_name][block.name]
            min_step = max(block.granularity, block.units // COARSE_STEP_DIVISOR) if coarse else 1
            choices = problem.list_unit_choices(node_name, block.name)
            units = _find_largest_choice(choices, kept_units - min_step)
            if units is None:
                continue
            smaller = replace_units(current, node_name, block_name=block.name, units=units)
            if not problem.is_allowed(smaller):
                continue
            saved_ms = latency_ms - problem.predict(smaller)
            if saved_ms <= MIN_SAVED_MS:
                continue
            loss_before = loss_increase(node_name, block.name, kept=kept_units)
            loss_after = loss_increase(node_name, block.name, kept=units)
            price = max(loss_after - loss_before, MIN_CUT_LOSS) / saved_ms
            if price < best_price:
                best_price = price
                best = smaller
    return best


def _find_largest_choice(choices: Sequence[int], max_units: int) -> int | None:
    """Find the largest choice that does not exceed `max_units`; None where all do."""
    smaller = [units for units in choices if units <= max_units]
    return smaller[-1] if smaller else None


def restore_dropped(
    problem: SearchProblem, candidate: Candidate, *, loss_increase: LossIncrease
) -> Candidate:
    """Restore dropped blocks until every node has those it must, then enforce the protection.

    Of the blocks that may come back, those whose drop hurts most do, each at its smallest size.

    Args:
        problem: Units that may be chosen, drops that are allowed, and the protection.
        candidate: The candidate to repair; blocks that it does not list are whole.
        loss_increase: Estimate for single cuts.
    """
    current = complete_candidate(problem, candidate)
    for node_name in problem.blocks:
        current = _restore_blocks_of_node(
            problem, current, node_name=node_name, loss_increase=loss_increase
        )
    return enforce_protection(problem, current, loss_increase=loss_increase)


def _restore_blocks_of_node(
    problem: SearchProblem, current: Candidate, *, node_name: str, loss_increase: LossIncrease
) -> Candidate:
    """Restore blocks of one node until it has as many as it must, one that reads its input among
    them."""
    dropped_count = list(current.kept_units[node_name].values()).count(0)
    smallest_units = _find_smallest_units(problem, node_name, candidate=current)

    def estimate_gain(block_name: str) -> float:
        loss_dropped = loss_increase(node_name, block_name, kept=0)
        loss_restored = loss_increase(node_name, block_name, kept=smallest_units[block_name])
        return loss_dropped - loss_restored

    by_gain = sorted(smallest_units, key=estimate_gain, reverse=True)
    restore_count = max(dropped_count - problem.max_drops.get(node_name, dropped_count), 0)
    if problem.lost_its_input(current, node_name):
        readers = problem.input_readers[node_name]
        best_readers = [name for name in by_gain if name in readers][:1]
        others = [name for name in by_gain if name not in best_readers]
        by_gain = best_readers + others
        restore_count = max(restore_count, len(best_readers))
    for block_name in by_gain[:restore_count]:
        units = smallest_units[block_name]
        current = replace_units(current, node_name, block_name=block_name, units=units)
    return current


def _find_smallest_units(
    problem: SearchProblem, node_name: str, *, candidate: Candidate
) -> dict[str, int]:
    """Find the fewest units of each dropped block of a node that can come back with any."""
    smallest_units: dict[str, int] = {}
    for block_name, kept_units in candidate.kept_units[node_name].items():
        choices = problem.list_unit_choices(node_name, block_name)
        positive_choices = [units for units in choices if units]
        if kept_units == 0 and positive_choices:
            smallest_units[block_name] = min(positive_choices)
    return smallest_units


def enforce_protection(
    problem: SearchProblem, candidate: Candidate, *, loss_increase: LossIncrease
) -> Candidate:
    """Give cross-modal units back until the protection holds, always where that undoes most loss.

    Where the spec's own cuts violate the protection, the candidate that comes nearest is returned.

    Args:
        problem: Units that may be chosen, and the protection.
        candidate: The candidate to repair; blocks that it does not list are whole.
        loss_increase: Estimate for single cuts.
    """
    current = complete_candidate(problem, candidate)
    excess = problem.compute_protection_excess(current)
    while excess > 0:
        larger = _find_best_protected_growth(
            problem, current, excess=excess, loss_increase=loss_increase
        )
        if larger is None:
            break
        current = larger
        excess = problem.compute_protection_excess(current)
    return current


def _find_best_protected_growth(
    problem: SearchProblem,
    current: Candidate,
    *,
    excess: float,
    loss_increase: LossIncrease,
) -> Candidate | None:
    """Find the step up of a cross-modal block that undoes most loss for the excess it takes
    away."""
    best_price = -math.inf
    best: Candidate | None = None
    for growth in _list_growths(problem, current, coarse=True):
        if growth.block_name not in problem.cross_modal.get(growth.node_name, ()):
            continue
        larger = _apply_growth(current, growth)
        excess_undone = excess - problem.compute_protection_excess(larger)
        if excess_undone <= MIN_EXCESS_UNDONE:
            continue
        loss_undone = _estimate_loss_undone(current, growth, loss_increase=loss_increase)
        price = loss_undone / excess_undone
        if price > best_price:
            best_price = price
            best = larger
    return best


def _list_growths(problem: SearchProblem, current: Candidate, *, coarse: bool) -> Iterator[_Growth]:
    """List the next step up of every block: the first that is large enough, else the largest."""
    for node_name, blocks in problem.blocks.items():
        for block in blocks:
            kept_units = current.kept_units[node_name][block.name]
            min_step = max(1, block.units // COARSE_STEP_DIVISOR) if coarse else 1
            choices = problem.list_unit_choices(node_name, block.name)
            larger = [units for units in choices if units > kept_units]
            if not larger:
                continue
            large_enough = [units for units in larger if units >= kept_units + min_step]
            units = large_enough[0] if large_enough else larger[-1]
            yield _Growth(node_name=node_name, block_name=block.name, units=units)


def _apply_growth(candidate: Candidate, growth: _Growth) -> Candidate:
    """Copy a candidate after a step up."""
    return replace_units(
        candidate, growth.node_name, block_name=growth.block_name, units=growth.units
    )


def _estimate_loss_undone(
    candidate: Candidate, growth: _Growth, *, loss_increase: LossIncrease
) -> float:
    """Estimate by how much a step up lowers the loss."""
    kept_units = candidate.kept_units[growth.node_name][growth.block_name]
    node_name = growth.node_name
    block_name = growth.block_name
    loss_before = loss_increase(node_name, block_name, kept=kept_units)
    return loss_before - loss_increase(node_name, block_name, kept=growth.units)


def grow_to_budget(
    problem: SearchProblem,
    candidate: Candidate,
    *,
    loss_increase: LossIncrease,
    rounding: Rounding,
) -> Candidate:
    """Grow a candidate up to the budget, always where a millisecond undoes most loss.

    Units are given back, in coarse steps and then in fine ones, or a node gets a finer precision.

    Args:
        problem: Budget, units and precisions that may be chosen, and limits.
        candidate: Where to start, within the budget.
        loss_increase: Estimate for single cuts.
        rounding: Loss increase by node and precision.

    Returns:
        A candidate within the budget that no single step can improve.
    """
    current = complete_candidate(problem, candidate)
    # Coarse steps come near the budget in few predictions, fine ones use up the rest.
    for coarse in (True, False):
        larger = _find_best_growth(
            problem, current, loss_increase=loss_increase, rounding=rounding, coarse=coarse
        )
        while larger is not None:
            current = larger
            larger = _find_best_growth(
                problem, current, loss_increase=loss_increase, rounding=rounding, coarse=coarse
            )
    return current


def _find_best_growth(
    problem: SearchProblem,
    current: Candidate,
    *,
    loss_increase: LossIncrease,
    rounding: Rounding,
    coarse: bool,
) -> Candidate | None:
    """Find the step up within the budget that undoes most loss per millisecond; None where there is
    none."""
    steps: list[tuple[float, Candidate]] = []
    for growth in _list_growths(problem, current, coarse=coarse):
        loss_undone = _estimate_loss_undone(current, growth, loss_increase=loss_increase)
        steps.append((loss_undone, _apply_growth(current, growth)))
    for node_name in problem.blocks:
        for precision in problem.precisions.get(node_name, ()):
            losses = rounding[node_name]
            loss_undone = losses[current.precision[node_name]] - losses[precision]
            if loss_undone > 0:
                finer = replace_precision(current, node_name, precision=precision)
                steps.append((loss_undone, finer))

    latency_ms = problem.predict(current)
    best_price = 0.0
    best: Candidate | None = None
    for loss_undone, larger in steps:
        added_ms = problem.predict(larger) - latency_ms
        price = max(loss_undone, MIN_GROWTH_LOSS) / max(added_ms, MIN_SAVED_MS)
        fits = latency_ms + added_ms <= problem.budget_ms
        if fits and price > best_price and problem.is_allowed(larger):
            best_price = price
            best = larger
    return best


def trade_for_precision(
    problem: SearchProblem,
    candidate: Candidate,
    *,
    loss_increase: LossIncrease,
    rounding: Rounding,
) -> list[Candidate]:
    """Trade units for a finer precision of one node, for every node and precision where that fits
    the budget.

    Args:
        problem: Budget, units and precisions that may be chosen, and limits.
        candidate: Where to start; the finer precision alone may take it over the budget.
        loss_increase: Estimate for single cuts.
        rounding: Loss increase by node and precision.

    Returns:
        One candidate for each trade, cut and grown to the budget.
    """
    traded_candidates: list[Candidate] = []
    for node_name, precisions in problem.precisions.items():
        for precision in precisions:
            losses = rounding[node_name]
            if losses[precision] >= losses[candidate.precision[node_name]]:
                continue
            finer_candidate = replace_precision(candidate, node_name, precision=precision)
            smaller = cut_to_budget(problem, finer_candidate, loss_increase=loss_increase)
            if smaller is None:
                continue
            traded_candidates.append(
                grow_to_budget(problem, smaller, loss_increase=loss_increase, rounding=rounding)
            )
    return traded_candidates
