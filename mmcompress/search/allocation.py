"""Allocation: how many units each block keeps, given the pruning ratios of a spec.

A ratio holds for the units of one node and group (`heads`, `ffn`, `tokens`). Cross-modal blocks
form a part of their own, whose ratio is divided by the protection. Every policy removes the same
share; they differ in where. A policy is one function. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mmcompress.graph.blocks import (
    Block,
    count_steps,
    count_units_after,
    cut_by_share,
    cut_evenly,
)
from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.search.knapsack import choose_options_at_total
from mmcompress.search.sensitivity.curves import SensitivityCurves
from mmcompress.spec.schema import NodePrune, Spec

BlockScores = Mapping[str, ArrayLike]
"""Importance of each unit [units], by block; tensors or arrays."""


Policy = Callable[[Sequence[Block], int, SensitivityCurves, BlockScores], KeptUnits]
"""(blocks of one part, steps to remove, curves, scores) -> units kept in each."""


@dataclass(frozen=True, kw_only=True)
class NodeAllocation:
    """What an allocation is made from, for one node."""

    cross_modal: Collection[str]
    """Names of the cross-modal blocks."""
    protection: float
    """Factor: cross-modal units are pruned this many times less."""
    policy: Policy
    """Chooses where the units of a part are removed."""
    curves: SensitivityCurves
    """Loss increase of cutting each block."""
    scores: BlockScores
    """Importance of the units of each block."""


def allocate_by_knapsack(
    blocks: Sequence[Block], steps_to_remove: int, curves: SensitivityCurves, scores: BlockScores
) -> KeptUnits:
    """Remove steps where the summed loss increase is least, by dynamic programming over the blocks.

    Args:
        blocks: Blocks of one part.
        steps_to_remove: Steps to remove of all blocks together.
        curves: Loss increase of cutting each block.
        scores: Not used: curves say what a cut costs.

    Returns:
        Units kept in each block.
    """
    steps_by_block = [np.arange(count_steps(block) + 1) for block in blocks]
    losses = []
    for block, steps in zip(blocks, steps_by_block, strict=True):
        losses.append(curves[block.name].interpolate(count_units_after(block, steps)))
    removed_steps = choose_options_at_total(steps_by_block, losses, total=steps_to_remove)
    return _keep_after_steps(blocks, removed_steps)


def allocate_by_rank(
    blocks: Sequence[Block], steps_to_remove: int, curves: SensitivityCurves, scores: BlockScores
) -> KeptUnits:
    """Remove the least important steps of the whole part, each from the bottom of its block.

    Args:
        blocks: Blocks of one part.
        steps_to_remove: Steps to remove of all blocks together.
        curves: Not used: scores say what a cut costs.
        scores: Importance of the units of each block.

    Returns:
        Units kept in each block.
    """
    ranking: list[tuple[float, int]] = []
    for i, block in enumerate(blocks):
        ascending = np.sort(np.asarray(scores[block.name]))
        for start in range(0, len(ascending), block.granularity):
            step = ascending[start : start + block.granularity]
            ranking.append((float(step.sum()), i))
    removed_steps = [0] * len(blocks)
    for _, i in sorted(ranking)[:steps_to_remove]:
        removed_steps[i] += 1
    return _keep_after_steps(blocks, removed_steps)


def allocate_uniformly(
    blocks: Sequence[Block], steps_to_remove: int, curves: SensitivityCurves, scores: BlockScores
) -> KeptUnits:
    """Remove the same share of every block, by the largest remainder.

    Args:
        blocks: Blocks of one part.
        steps_to_remove: Steps to remove of all blocks together.
        curves: Not used.
        scores: Not used.

    Returns:
        Units kept in each block.
    """
    names = [block.name for block in blocks]
    return dict(zip(names, cut_evenly(blocks, steps_to_remove), strict=True))


def _keep_after_steps(blocks: Sequence[Block], removed_steps: Sequence[int]) -> KeptUnits:
    """List the units that blocks keep after steps are removed."""
    kept_units: KeptUnits = {}
    for block, steps in zip(blocks, removed_steps, strict=True):
        kept_units[block.name] = int(count_units_after(block, steps))
    return kept_units


def allocate_node(
    blocks: Sequence[Block], prune: NodePrune, *, inputs: NodeAllocation
) -> KeptUnits:
    """Allocate the cuts of one node.

    Ratios of single blocks come first, then whole blocks are dropped, and the policy cuts the rest.

    Args:
        blocks: All blocks of the node.
        prune: Ratios, drops and ratios of single blocks.
        inputs: What the allocation is made from.

    Returns:
        Units kept in every block.
    """
    kept_units = {block.name: block.units for block in blocks}
    free_blocks: list[Block] = []
    for block in blocks:
        if block.name in prune.blocks:
            kept_units[block.name] = cut_by_share(block, prune.blocks[block.name])
        else:
            free_blocks.append(block)
    dropped_blocks = _choose_dropped_blocks(free_blocks, prune.drop, inputs=inputs)
    kept_units |= dict.fromkeys(dropped_blocks, 0)
    ratio_by_group = {"heads": prune.heads, "ffn": prune.ffn, "tokens": prune.tokens}
    for group, ratio in ratio_by_group.items():
        group_blocks = [block for block in free_blocks if block.group == group]
        for is_cross_modal in (False, True):
            part = [
                block
                for block in group_blocks
                if (block.name in inputs.cross_modal) == is_cross_modal
            ]
            if is_cross_modal:
                # Rounded down: what is protected never loses more than its share.
                to_remove = int(ratio / inputs.protection * _count_all_steps(part))
            else:
                to_remove = int(ratio * _count_all_steps(part) + 0.5)
            remaining = [block for block in part if block.name not in dropped_blocks]
            # Steps of dropped blocks count as removed.
            to_remove -= _count_all_steps(part) - _count_all_steps(remaining)
            if remaining and to_remove > 0:
                kept_units |= inputs.policy(remaining, to_remove, inputs.curves, inputs.scores)
    return kept_units


def _count_all_steps(blocks: Sequence[Block]) -> int:
    """Count the steps of blocks together."""
    return sum(count_steps(block) for block in blocks)


def _choose_dropped_blocks(
    blocks: Sequence[Block], count: int, *, inputs: NodeAllocation
) -> set[str]:
    """Choose the blocks that are removed whole: those whose drop is estimated to hurt least."""

    def estimate_drop_loss(block: Block) -> float:
        weight = inputs.protection if block.name in inputs.cross_modal else 1.0
        return float(inputs.curves[block.name].interpolate(0)) * weight

    ordered_blocks = [block for block in sorted(blocks, key=estimate_drop_loss) if block.drop]
    return {block.name for block in ordered_blocks[:count]}


def allocate_pipeline(
    spec: Spec,
    blocks: Mapping[str, Sequence[Block]],
    *,
    cross_modal: Mapping[str, Collection[str]],
    curves: Mapping[str, SensitivityCurves],
    scores: Mapping[str, BlockScores],
    policy: Policy,
) -> Candidate:
    """Make the candidate that a spec (with a trial's overrides) describes.

    Args:
        spec: Ratios and precisions of every node, and the protection.
        blocks: Blocks by node.
        cross_modal: Names of the cross-modal blocks, by node.
        curves: Loss increase of cutting each block, by node.
        scores: Importance of the units of each block, by node.
        policy: Chooses where the units of a part are removed.

    Returns:
        The candidate; a precision left to the search counts as fp32.
    """
    kept_units: dict[str, KeptUnits] = {}
    precision: dict[str, str] = {}
    for node_name, node in spec.list_model_nodes().items():
        inputs = NodeAllocation(
            cross_modal=cross_modal[node_name],
            protection=spec.prune.protection,
            policy=policy,
            curves=curves[node_name],
            scores=scores[node_name],
        )
        kept_units[node_name] = allocate_node(blocks[node_name], node.prune, inputs=inputs)
        precision[node_name] = "fp32" if node.precision == "auto" else node.precision
    return Candidate(kept_units=kept_units, precision=precision)
