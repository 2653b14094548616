"""The warm start: the split of the latency budget over all blocks of all models with the least total damage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.search.sensitivity.curves import SensitivityCurves

BUDGET_BINS = 4000


MAX_WINDOW_LENGTHS = 7
"""Lengths of a node's window that are tried, each with every choice of precisions."""


MAX_COMBINATIONS = 600
"""Choices of windows and precisions that are solved; of more, some are left out."""


def solve_knapsack(
    costs: list[np.ndarray], damages: list[np.ndarray], *, budget: float
) -> list[int] | None:
    """Multiple-choice knapsack: one option per row, least damage with total cost within budget; None if impossible.

    Costs are rounded up to a `BINS`-th of the budget, so a solution never exceeds it. Of solutions that do equal damage
    it is the one that costs most: what is not cut can't hurt.
    """
    if budget <= 0:
        return None
    best = np.full(BUDGET_BINS + 1, np.inf)
    best[0] = 0.0
    picks: list[np.ndarray] = []
    for cost, damage in zip(costs, damages, strict=True):
        bins = np.ceil(np.asarray(cost) / budget * BUDGET_BINS - 1e-9).astype(int)
        options = np.full((len(bins), BUDGET_BINS + 1), np.inf)
        for i, b in enumerate(bins):
            if b <= BUDGET_BINS:
                options[i, b:] = best[: BUDGET_BINS + 1 - b] + damage[i]
        picks.append(options.argmin(0))
        best = options.min(0)
    if not np.isfinite(best).any():
        return None
    at = BUDGET_BINS - int(best[::-1].argmin())
    chosen = []
    for cost, pick in zip(reversed(costs), reversed(picks), strict=True):
        i = int(pick[at])
        chosen.append(i)
        at -= int(np.ceil(cost[i] / budget * BUDGET_BINS - 1e-9))
    return list(reversed(chosen))


def thin_out_levels(choices: Sequence[int], most: int = 17) -> list[int]:
    """The kept counts offered to the knapsack: all of a few, `most` of many, the ends always."""
    if len(choices) <= most:
        return list(choices)
    return sorted({choices[round((len(choices) - 1) * i / (most - 1))] for i in range(most)})


def limit_combinations(
    precisions: Mapping[str, Sequence[str]],
    rounding: Mapping[str, Mapping[str, float]],
    *,
    lengths: Sequence[Sequence[int]],
    whole_ms: Callable[[str, str], float],
) -> tuple[dict[str, list[str]], list[list[int]]]:
    """Precisions by node, and lengths by window, of which at most `SPLITS` combinations exist.

    Of precisions the one that does least harm and the quickest stay (`whole_ms`: milliseconds of a whole node in one),
    of lengths the ends and the middle; where even that is too much, of many nodes only the quickest.
    """
    left, windows = {n: list(ps) for n, ps in precisions.items()}, [list(of) for of in lengths]
    count = lambda: math.prod(map(len, left.values())) * math.prod(map(len, windows))
    ends = lambda n: [
        min(left[n], key=lambda p: rounding[n][p]),
        min(left[n], key=lambda p: whole_ms(n, p)),
    ]
    for most in (2, 1):
        harm = lambda n: min(rounding[n][p] for p in ends(n)[1:])  # of its quickest precision
        for n in sorted(left, key=harm):
            if count() > MAX_COMBINATIONS:
                left[n] = list(dict.fromkeys(ends(n)))[-most:]
        if most > 1 and count() > MAX_COMBINATIONS:
            windows = [thin_out_levels(of, 3) for of in windows]
    return left, windows


def split_by_knapsack(
    blocks: Mapping[str, tuple[Block, ...]],
    cross: Mapping[str, Mapping[str, str]],
    curves: Mapping[str, SensitivityCurves],
    predictor: Predictor,
    budget_ms: float,
    protection: float,
    precisions: Mapping[str, Sequence[str]],
    rounding: Mapping[str, Mapping[str, float]],
    choices: Mapping[str, Mapping[str, Sequence[int]]],
) -> list[tuple[float, Candidate]]:
    """(estimated damage, candidate) of the best split for every choice of precisions in `few`, least damage first."""
    rows, found = predictor.table.index_rows(), []
    nodes, windowed = list(blocks), [n for n in blocks if "tokens" in choices[n]]
    options = {
        n: {b.name: thin_out_levels(choices[n][b.name]) for b in blocks[n] if b.group != "tokens"}
        for n in nodes
    }
    damages = {
        (n, b): curves[n][b].loss_increase(np.array(o)) * (protection if b in cross[n] else 1.0)
        for n in nodes
        for b, o in options[n].items()
    }
    order = [(n, b) for n in nodes for b in options[n]]
    whole = lambda n, p: predictor.node_table_ms(n, {}, precision=p, rows=rows)
    precisions, lengths = limit_combinations(
        precisions,
        rounding,
        lengths=[thin_out_levels(choices[n]["tokens"], MAX_WINDOW_LENGTHS) for n in windowed],
        whole_ms=whole,
    )
    for window in itertools.product(*lengths):
        left = {n: {"tokens": k} for n, k in zip(windowed, window, strict=True)}
        cuts, costs = predictor.count_cut_positions(left), {}
        paid = sum(
            float(curves[n]["tokens"].loss_increase(kept["tokens"])) for n, kept in left.items()
        )
        for n in nodes:
            for p, placed in itertools.product(precisions[n], predictor.deployed[n]):
                ms = [
                    predictor.block_ms(n, placed, units=k, precision=p, rows=rows, cuts=cuts)
                    for k in options[n][placed.name]
                ]
                costs[n, placed.name, p] = np.array(ms)
        for choice in itertools.product(*(precisions[n] for n in nodes)):
            precision = dict(zip(nodes, choice, strict=True))
            fixed = predictor.overhead_ms + sum(
                predictor.base_ms(n, precision[n], cuts=cuts) for n in nodes
            )
            picked = solve_knapsack(
                [costs[n, b, precision[n]] for n, b in order],
                [damages[at] for at in order],
                budget=budget_ms / predictor.factor - fixed,
            )
            if picked is None:
                continue
            kept = {n: dict(left.get(n, {})) for n in nodes}
            for (n, b), i in zip(order, picked, strict=True):
                kept[n][b] = options[n][b][i]
            damage = paid + sum(float(damages[at][i]) for at, i in zip(order, picked, strict=True))
            damage += sum(rounding[n][precision[n]] for n in nodes)
            found.append((damage, Candidate(kept, precision)))
    return sorted(found, key=lambda f: f[0])
