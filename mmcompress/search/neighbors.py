"""Neighbours of a good structure: units move from some blocks to others. No torch here."""

from __future__ import annotations

import random
from collections.abc import Collection

from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.results.records import Trial
from mmcompress.search.problem import SearchProblem

MAX_SWITCH_TRIES = 400
"""Random switches that are tried before a structure counts as having no new neighbour."""


PRECISION_SWITCH_CHANCE = 0.15
"""Probability that a switch draws the precision of one node anew as well."""


MIN_BUDGET_USE = 0.8
"""Share of the budget: a neighbour predicted to take less is not worth a trial."""


SWITCHED_BLOCK_COUNTS = (1, 1, 2)
"""Blocks that are given units, or lose them, in one switch; one of these is drawn."""


FFN_STEP_FACTORS = (2, 4, 8)
"""Steps of an FFN block in one switch; one of these is drawn. Of heads it is one step."""


def switch_levels(
    problem: SearchProblem, best: Trial | None, *, seen_keys: Collection[str], rng: random.Random
) -> Candidate | None:
    """Draw a new neighbour by level switches: some blocks are given units, others lose them.

    After Sieberling et al. 2025, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
    Search".

    Args:
        problem: Budget, choices and limits that a neighbour must meet.
        best: The trial whose structure is changed.
        seen_keys: Keys of candidates that are not new.
        rng: Where chance comes from; the same state gives the same neighbour.

    Returns:
        A candidate near the budget; None without a trial, or where no try finds one.
    """
    if best is None:
        return None
    for _ in range(MAX_SWITCH_TRIES):
        candidate = _draw_neighbour(problem, best.candidate, rng=rng)
        latency_ms = problem.predict(candidate)
        if candidate.make_key() in seen_keys or not problem.is_allowed(candidate):
            continue
        if MIN_BUDGET_USE * problem.budget_ms <= latency_ms <= problem.budget_ms:
            return candidate
    return None


def _draw_neighbour(
    problem: SearchProblem, candidate: Candidate, *, rng: random.Random
) -> Candidate:
    """Draw a level switch of a candidate, allowed or not."""
    kept_units: dict[str, KeptUnits] = {}
    for node_name, node_units in candidate.kept_units.items():
        kept_units[node_name] = dict(node_units)
    precision = dict(candidate.precision)
    if rng.random() < PRECISION_SWITCH_CHANCE:
        node_name = rng.choice(list(precision))
        own_precision = (precision[node_name],)
        precision[node_name] = rng.choice(problem.precisions.get(node_name, own_precision))

    # Units are given first and taken next, so that a switch keeps the latency about the same.
    places = [(name, block) for name, blocks in problem.blocks.items() for block in blocks]
    for direction in (1, -1):
        count = min(rng.choice(SWITCHED_BLOCK_COUNTS), len(places))
        for node_name, block in rng.sample(places, count):
            steps = rng.choice(FFN_STEP_FACTORS) if block.group == "ffn" else 1
            units = kept_units[node_name].get(block.name, block.units)
            wanted = units + direction * block.granularity * steps
            kept_units[node_name][block.name] = problem.find_nearest_choice(
                node_name, block.name, units=min(max(wanted, 0), block.units)
            )
    return Candidate(kept_units=kept_units, precision=precision)
