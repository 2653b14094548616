"""The warm start: the split of the latency budget over all blocks of all models with the least total damage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from mmcompress.measure.predict import Predictor
from mmcompress.prune.allocation import Curves
from mmcompress.records import Block, Candidate

BINS = 1000


def solve(costs: list[np.ndarray], damages: list[np.ndarray], budget: float) -> list[int] | None:
    """Multiple-choice knapsack: one option per row, least damage with total cost within budget; None if impossible.

    Costs are rounded up to a thousandth of the budget, so a solution never exceeds it.
    """
    if budget <= 0:
        return None
    best = np.full(BINS + 1, np.inf)
    best[0] = 0.0
    picks: list[np.ndarray] = []
    for cost, damage in zip(costs, damages, strict=True):
        bins = np.ceil(np.asarray(cost) / budget * BINS - 1e-9).astype(int)
        options = np.full((len(bins), BINS + 1), np.inf)
        for i, b in enumerate(bins):
            if b <= BINS:
                options[i, b:] = best[: BINS + 1 - b] + damage[i]
        picks.append(options.argmin(0))
        best = options.min(0)
    if not np.isfinite(best).any():
        return None
    at = int(best.argmin())
    chosen = []
    for cost, pick in zip(reversed(costs), reversed(picks), strict=True):
        i = int(pick[at])
        chosen.append(i)
        at -= int(np.ceil(cost[i] / budget * BINS - 1e-9))
    return list(reversed(chosen))


def levels(choices: Sequence[int]) -> list[int]:
    """The kept counts offered to the knapsack: all of a few, about sixteen of many, the ends always."""
    if len(choices) <= 17:
        return list(choices)
    return sorted({choices[round((len(choices) - 1) * i / 16)] for i in range(17)} | {choices[0]})


def candidates(
    blocks: Mapping[str, tuple[Block, ...]],
    cross: Mapping[str, Mapping[str, str]],
    curves: Mapping[str, Curves],
    predictor: Predictor,
    budget_ms: float,
    protection: float,
    precisions: Mapping[str, tuple[str, ...]],
    int8_damage: Mapping[str, float],
    choices: Mapping[str, Mapping[str, Sequence[int]]],
) -> list[tuple[float, Candidate]]:
    """(estimated damage, candidate) of the best split for every choice of precisions, least damage first."""
    rows, found = predictor.table.lookup(), []
    nodes = list(blocks)
    for choice in itertools.product(*(precisions[n] for n in nodes)):
        precision = dict(zip(nodes, choice, strict=True))
        fixed = predictor.overhead_ms + sum(predictor.affine[n][precision[n]].base for n in nodes)
        costs, damages, names = [], [], []
        for n in nodes:
            scale = predictor.affine[n][precision[n]].scale
            for block, placed in zip(blocks[n], predictor.placed[n], strict=True):
                options = levels(choices[n][block.name])
                weight = protection if block.name in cross[n] else 1.0
                costs.append(np.array([scale * predictor.block(rows, placed, k, precision[n]) for k in options]))
                damages.append(curves[n][block.name].at(np.array(options)) * weight)
                names.append((n, block.name, options))
        picked = solve(costs, damages, budget_ms / predictor.correction - fixed)
        if picked is None:
            continue
        kept: dict[str, dict[str, int]] = {n: {} for n in nodes}
        for (n, b, options), i in zip(names, picked, strict=True):
            kept[n][b] = options[i]
        damage = sum(float(d[i]) for d, i in zip(damages, picked, strict=True))
        damage += sum(int8_damage[n] for n in nodes if precision[n] == "int8")
        found.append((damage, Candidate(kept, precision)))
    return sorted(found, key=lambda f: f[0])
