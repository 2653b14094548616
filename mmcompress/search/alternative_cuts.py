"""Several ways to cut a structure to one budget, each at another place."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from mmcompress.graph.structure import Candidate
from mmcompress.search.problem import LossIncrease, SearchProblem
from mmcompress.search.repair import cut_to_budget

MAX_ALTERNATIVE_CUTS = 8
"""Cuts at most: each of them takes a refit and a validation to measure."""


def list_alternative_cuts(
    problem: SearchProblem, structure: Candidate, *, loss_increase: LossIncrease
) -> list[Candidate]:
    """Cut a structure to the budget in several ways.

    The first way cuts wherever the estimate finds it cheapest. Every other way cuts one group of
    blocks (heads, feed-forward channels or positions) of one node alone.

    Args:
        problem: Budget, units that blocks may keep, and limits.
        structure: Where to start, complete.
        loss_increase: Estimate for single cuts.

    Returns:
        Distinct structures within the budget, at most `MAX_ALTERNATIVE_CUTS`. Empty where the
        first way finds none.
    """
    cheapest = cut_to_budget(problem, structure, loss_increase=loss_increase)
    if cheapest is None:
        return []
    cuts_of_one_group: list[Candidate] = []
    groups = sorted({block.group for blocks in problem.blocks.values() for block in blocks})
    for node_name, group in product(problem.blocks, groups):
        narrow_problem = _allow_one_group(problem, structure, node_name=node_name, group=group)
        cut = cut_to_budget(narrow_problem, structure, loss_increase=loss_increase)
        if cut is not None:
            cuts_of_one_group.append(cut)

    def estimate_loss(candidate: Candidate) -> float:
        losses = [
            loss_increase(node_name, block_name, kept=units)
            for node_name, kept_units in candidate.kept_units.items()
            for block_name, units in kept_units.items()
        ]
        return sum(losses)

    cuts_of_one_group.sort(key=estimate_loss)
    distinct_cuts = {cut.make_key(): cut for cut in [cheapest, *cuts_of_one_group]}
    return list(distinct_cuts.values())[:MAX_ALTERNATIVE_CUTS]


def _allow_one_group(
    problem: SearchProblem, structure: Candidate, *, node_name: str, group: str
) -> SearchProblem:
    """Return a problem in which only the blocks of one group of one node may change."""
    unit_choices: dict[str, dict[str, tuple[int, ...]]] = {}
    for other_name, blocks in problem.blocks.items():
        unit_choices[other_name] = {}
        for block in blocks:
            choices = problem.list_unit_choices(other_name, block.name)
            if other_name != node_name or block.group != group:
                choices = (structure.kept_units[other_name][block.name],)
            unit_choices[other_name][block.name] = choices
    return replace(problem, unit_choices=unit_choices)
