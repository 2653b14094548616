"""TODO."""

from __future__ import annotations

import random
from collections.abc import Collection

from mmcompress.graph.structure import Candidate
from mmcompress.results.records import Trial
from mmcompress.search.problem import SearchProblem


def switch_levels(
    problem: SearchProblem, top: Trial | None, *, seen: Collection[str], rng: random.Random
) -> Candidate | None:
    """A level switch (EvoPress, Sieberling et al. 2025): units given to some blocks, taken from others, in budget."""
    if top is None:
        return None
    places = [(n, b) for n, blocks in problem.blocks.items() for b in blocks]
    for _ in range(400):
        kept = {n: dict(k) for n, k in top.candidate.kept_units.items()}
        precision = dict(top.candidate.precision)
        if rng.random() < 0.15:
            node = rng.choice(list(precision))
            precision[node] = rng.choice(problem.precisions.get(node, ("fp32",)))
        for sign in (1, -1):
            for node, b in rng.sample(places, rng.choice((1, 1, 2))):
                size = b.granularity * (rng.choice((2, 4, 8)) if b.group == "ffn" else 1)
                now = kept[node].get(b.name, b.units)
                kept[node][b.name] = problem.nearest_choice(
                    node, b.name, kept=min(max(now + sign * size, 0), b.units)
                )
        candidate = Candidate(kept, precision)
        latency = problem.predict(candidate)
        if (
            candidate.key() not in seen
            and problem.is_allowed(candidate)
            and 0.8 * problem.budget_ms <= latency <= problem.budget_ms
        ):
            return candidate
    return None
