"""Splits of the budget that the problem allows: those of the knapsack, repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.search.bisection import bisect_share
from mmcompress.search.problem import SearchProblem
from mmcompress.search.repair import cut_to_budget, restore_dropped
from mmcompress.search.sensitivity.curves import CutWeights, SensitivityTable
from mmcompress.search.split_by_knapsack import BudgetSplit, SplitInputs, split_by_knapsack

MAX_ALLOWED_SPLITS = 12
"""Splits of the knapsack that are looked at, the best ones."""


PARALLEL_BISECTION_STEPS = 6
"""Halvings of the factor by which parallel branches may exceed the budget together."""


def split_budget(
    problem: SearchProblem,
    sensitivity: SensitivityTable,
    *,
    predictor: Predictor,
    budget_ms: float,
    nodes: Sequence[str] = (),
) -> list[Candidate]:
    """Split a budget over the blocks of some nodes; repair splits that are not allowed.

    The knapsack adds up what the nodes take. Where branches run in parallel it is given more than
    the budget: as much as leaves the critical path within.

    Args:
        problem: Blocks, choices and limits.
        sensitivity: Loss increases of cuts and roundings.
        predictor: Predicts latencies; without the other limits of the problem.
        budget_ms: Milliseconds that the nodes may be predicted to take.
        nodes: The nodes to split over, all by default. Of some alone no limit of the pipeline is
            checked.

    Returns:
        Candidates (of these nodes), least estimated loss increase first.
    """
    inputs = _collect_inputs(problem, sensitivity, predictor=predictor, nodes=nodes)
    # Repairs keep the budget that is split, which may be smaller than that of the problem.
    repair_problem = replace(problem, budget_ms=budget_ms)

    def list_splits(summed_ms: float) -> list[Candidate]:
        splits = split_by_knapsack(inputs, summed_ms)
        if not nodes:
            splits = _repair_splits(repair_problem, sensitivity, splits=splits)
        return [split.candidate for split in splits]

    candidates = list_splits(budget_ms)
    has_parallel_branches = bool(predictor.reads) and not nodes and len(problem.blocks) > 1
    if not has_parallel_branches:
        return candidates

    # Parallel branches overlap: the sum of what all nodes take may exceed what a request takes.
    candidates_by_factor: dict[float, list[Candidate]] = {}

    def exceeds_budget(factor: float) -> bool:
        splits = list_splits(factor * budget_ms)
        within_budget = [candidate for candidate in splits if predictor(candidate) <= budget_ms]
        if within_budget:
            candidates_by_factor[factor] = within_budget
        return not within_budget

    largest_factor, _ = bisect_share(
        exceeds_budget, low=1.0, high=float(len(problem.blocks)), steps=PARALLEL_BISECTION_STEPS
    )
    return candidates_by_factor.get(largest_factor, candidates)


def _collect_inputs(
    problem: SearchProblem,
    sensitivity: SensitivityTable,
    *,
    predictor: Predictor,
    nodes: Sequence[str],
) -> SplitInputs:
    """Collect what the knapsack needs of the given nodes, or of all."""
    node_names = nodes or list(problem.blocks)
    blocks = {name: problem.blocks[name] for name in node_names}
    unit_choices = {name: problem.unit_choices[name] for name in node_names}
    precisions = {name: problem.precisions[name] for name in node_names}
    return SplitInputs(
        blocks=blocks,
        sensitivity=sensitivity,
        cut_weights=_weigh_cuts(problem),
        unit_choices=unit_choices,
        precisions=precisions,
        predictor=replace(predictor, reads={}),
    )


def _repair_splits(
    problem: SearchProblem, sensitivity: SensitivityTable, *, splits: Sequence[BudgetSplit]
) -> list[BudgetSplit]:
    """Repair splits that the problem does not allow; the first few remain, sorted anew.

    A split that no repair brings within every limit is left out.
    """
    cut_weights = _weigh_cuts(problem)
    allowed_splits: list[BudgetSplit] = []
    for split in splits:
        if problem.is_allowed(split.candidate):
            allowed_splits.append(split)
        else:
            restored_candidate = restore_dropped(
                problem, split.candidate, loss_increase=sensitivity.estimate_loss_increase
            )
            smaller = cut_to_budget(
                problem, restored_candidate, loss_increase=sensitivity.estimate_loss_increase
            )
            if smaller is not None and problem.is_allowed(smaller):
                loss_increase = sensitivity.add_losses(smaller, cut_weights=cut_weights)
                allowed_splits.append(BudgetSplit(candidate=smaller, loss_increase=loss_increase))
        # A repair does not lower the estimated loss: the splits behind are worse.
        if len(allowed_splits) == MAX_ALLOWED_SPLITS:
            break
    return sorted(allowed_splits, key=lambda split: split.loss_increase)


def _weigh_cuts(problem: SearchProblem) -> CutWeights:
    """Weigh the loss increases of cross-modal cuts, as the protection asks for."""
    weights: dict[str, dict[str, float]] = {}
    for node_name, block_names in problem.cross_modal.items():
        weights[node_name] = dict.fromkeys(block_names, problem.cross_modal_loss_weight)
    return weights
