"""Which training pairs a step sees: fresh ones first, and later the same ones in another mix.

Pairs are drawn by the batch, and a draw of one number always has the same pairs. The first steps
take new draws. Then every pass goes through them again in another order, and mixes the pairs of a
few draws that follow each other. What the teacher puts out for a draw is kept on disk, so only new
draws cost its forward pass.
"""

from __future__ import annotations

import math

import numpy as np

MIN_DISTINCT_DRAWS = 50
"""Draws that a training has before any comes again: a short training learns from each pair once."""

MIXED_DRAWS = 4
"""Draws whose pairs are mixed: as many are held in memory."""

PlannedPair = tuple[int, int]
"""(number of the draw, place of the pair in it)."""


def count_distinct_draws(steps: int, max_passes: int) -> int:
    """Return how many draws a training of some steps takes, so that no pair comes too often.

    Args:
        steps: Steps of the training.
        max_passes: Most times that a pair comes.
    """
    return max(math.ceil(steps / max_passes), MIN_DISTINCT_DRAWS)


def plan_pairs(step: int, distinct_draws: int, *, batch: int, seed: int) -> list[PlannedPair]:
    """Plan the pairs of a step.

    Args:
        step: The step, from 0.
        distinct_draws: Draws that there are; 0: as many as there are steps.
        batch: Pairs of a draw, and of a step.
        seed: What the mix depends on.
    """
    if not distinct_draws or step < distinct_draws:
        return [(step, place) for place in range(batch)]
    pass_number, position = divmod(step, distinct_draws)
    order = np.random.default_rng([seed, pass_number]).permutation(distinct_draws)
    first = position - position % MIXED_DRAWS
    draws = order[first : first + MIXED_DRAWS]
    mix = np.random.default_rng([seed, pass_number, first]).permutation(len(draws) * batch)
    start = (position - first) * batch
    pairs: list[PlannedPair] = []
    for pair in mix[start : start + batch].tolist():
        pairs.append((int(draws[pair // batch]), pair % batch))
    return pairs
