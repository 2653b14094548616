"""How many units each block keeps, given the pruning ratios of a spec: one function a policy.

Ratios speak of the units of one node and group (`heads`, `ffn`, `tokens`); cross-modal blocks form a part of their own
whose ratio is divided by the protection factor. Every policy removes the same share; they differ in where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from mmcompress.graph.blocks import Block, count_steps, units_after
from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.search.sensitivity.curves import SensitivityCurves
from mmcompress.spec.schema import NodePrune, Spec

Policy = Callable[[Sequence[Block], int, SensitivityCurves, Mapping[str, Tensor]], KeptUnits]
"""(blocks of one part, steps to remove, curves, scores) -> units kept."""


def allocate_by_knapsack(
    blocks: Sequence[Block], remove: int, curves: SensitivityCurves, scores: Mapping[str, Tensor]
) -> KeptUnits:
    """Least total damage at the given number of cuts, by dynamic programming over the blocks."""
    best = np.full(remove + 1, np.inf)
    best[0] = 0.0
    choices = []
    for block in blocks:
        cost = curves[block.name].loss_increase(
            units_after(block, np.arange(count_steps(block) + 1))
        )
        options = np.full((remove + 1, len(cost)), np.inf)
        for cut in range(min(len(cost), remove + 1)):
            options[cut:, cut] = best[: remove + 1 - cut] + cost[cut]
        choices.append(options.argmin(1))
        best = options.min(1)
    kept, left = {}, remove
    for block, choice in zip(reversed(blocks), reversed(choices), strict=True):
        kept[block.name] = int(units_after(block, choice[left]))
        left -= int(choice[left])
    return kept


def allocate_by_rank(
    blocks: Sequence[Block], remove: int, curves: SensitivityCurves, scores: Mapping[str, Tensor]
) -> KeptUnits:
    """The least important steps of the whole part, each the sum of its units taken from the bottom of its block."""
    costs = []
    for i, block in enumerate(blocks):
        low = scores[block.name].sort().values
        costs += [(float(s.sum()), i) for s in low.split(block.granularity)]
    cuts = [0] * len(blocks)
    for _, i in sorted(costs)[:remove]:
        cuts[i] += 1
    return {b.name: int(units_after(b, c)) for b, c in zip(blocks, cuts, strict=True)}


def allocate_uniformly(
    blocks: Sequence[Block], remove: int, curves: SensitivityCurves, scores: Mapping[str, Tensor]
) -> KeptUnits:
    """The same share of every block, by the largest remainder."""
    cuts = apportion_cuts([count_steps(b) for b in blocks], remove)
    return {b.name: int(units_after(b, c)) for b, c in zip(blocks, cuts, strict=True)}


def apportion_cuts(sizes: Sequence[int], remove: int) -> list[int]:
    """So many cuts in proportion to sizes, by the largest remainder: the first of equal ones."""
    ideal = [remove * size / sum(sizes) for size in sizes]
    cuts = [int(x) for x in ideal]
    for i in sorted(range(len(sizes)), key=lambda i: cuts[i] - ideal[i])[: remove - sum(cuts)]:
        cuts[i] += 1
    return cuts


def allocate_node(
    blocks: Sequence[Block],
    prune: NodePrune,
    *,
    cross: Mapping[str, str],
    protection: float,
    policy: Policy,
    curves: SensitivityCurves,
    scores: Mapping[str, Tensor],
) -> KeptUnits:
    """Units kept in every block of one node."""
    kept = {b.name: b.units for b in blocks}
    fixed = {b.name for b in blocks if b.name in prune.blocks}
    for b in blocks:
        if b.name in prune.blocks:
            kept[b.name] = int(units_after(b, round(prune.blocks[b.name] * count_steps(b))))
    free = [b for b in blocks if b.name not in fixed]
    weight = {b.name: protection if b.name in cross else 1.0 for b in free}
    by_damage = sorted(free, key=lambda b: float(curves[b.name].loss_increase(0)) * weight[b.name])
    dropped = {b.name for b in [b for b in by_damage if b.drop][: prune.drop]}
    kept |= dict.fromkeys(dropped, 0)
    for group, ratio in (("heads", prune.heads), ("ffn", prune.ffn), ("tokens", prune.tokens)):
        for crossing in (False, True):
            part = [b for b in free if b.group == group and (b.name in cross) == crossing]
            total = sum(count_steps(b) for b in part)
            share = ratio / protection if crossing else ratio
            wanted = int(share * total + (0 if crossing else 0.5))
            part = [b for b in part if b.name not in dropped]
            remove = wanted - (total - sum(count_steps(b) for b in part))
            if part and remove > 0:
                kept |= policy(part, remove, curves, scores)
    return kept


def allocate_pipeline(
    spec: Spec,
    blocks: Mapping[str, Sequence[Block]],
    *,
    cross: Mapping[str, Mapping[str, str]],
    curves: Mapping[str, SensitivityCurves],
    scores: Mapping[str, Mapping[str, Tensor]],
    policy: Policy,
) -> Candidate:
    """The candidate a spec (with a trial's overrides) describes."""
    models = spec.model_nodes()
    kept = {
        n: allocate_node(
            blocks[n],
            node.prune,
            cross=cross[n],
            protection=spec.prune.protection,
            policy=policy,
            curves=curves[n],
            scores=scores[n],
        )
        for n, node in models.items()
    }
    return Candidate(
        kept,
        {n: "fp32" if node.precision == "auto" else node.precision for n, node in models.items()},
    )
