"""Rounds of pruning: how many units are left after each, and which ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block, count_units_after
from mmcompress.graph.structure import KeptUnits
from mmcompress.models.base import Model
from mmcompress.models.device import CPU
from mmcompress.prune.surgery import copy_without_units
from mmcompress.prune.units import choose_units

Survivors = dict[str, dict[str, Tensor]]
"""Sorted indices of the units of the dense models that are left, by node and block."""


def plan_rounds(
    blocks: Mapping[str, Sequence[Block]], final: Mapping[str, KeptUnits], *, rounds: int
) -> list[dict[str, KeptUnits]]:
    """Plan how many units are kept after each round, many cut at first and few at the end.

    The share of all cuts that is done after round i of n is 1 - (1 - i / n)^3 (Zhu and Gupta 2017).
    What is dropped whole goes in the last round.

    Args:
        blocks: Blocks by node.
        final: Units kept after the last round; a block that is not listed stays whole.
        rounds: How many rounds there are.

    Returns:
        Units kept after each round, by node and block.
    """
    plan: list[dict[str, KeptUnits]] = []
    for i in range(1, rounds + 1):
        cut_share = 1 - (1 - i / rounds) ** 3
        is_last = i == rounds
        kept: dict[str, KeptUnits] = {}
        for node_name, node_blocks in blocks.items():
            kept[node_name] = {}
            for block in node_blocks:
                final_units = final[node_name].get(block.name, block.units)
                if is_last:
                    # Only the last round may drop a block whole.
                    kept[node_name][block.name] = final_units
                else:
                    kept[node_name][block.name] = _plan_units(
                        block, final_units, cut_share=cut_share
                    )
        plan.append(kept)
    return plan


def _plan_units(block: Block, final_units: int, *, cut_share: float) -> int:
    """Return the units kept when a share of a block's cut is done: one step at least."""
    final_steps = (block.units - final_units) / block.granularity
    removed_steps = int(cut_share * final_steps)
    units_left = int(count_units_after(block, removed_steps))
    return max(units_left, final_units, block.granularity)


def list_all_units(blocks: Mapping[str, Sequence[Block]]) -> Survivors:
    """Return the units of blocks before any cut."""
    survivors: Survivors = {}
    for node_name, node_blocks in blocks.items():
        survivors[node_name] = {
            block.name: torch.arange(block.units, device=CPU) for block in node_blocks
        }
    return survivors


def narrow_models(
    models: Mapping[str, Model],
    survivors: Survivors,
    *,
    kept: Mapping[str, KeptUnits],
    scores: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, Model], Survivors]:
    """Cut the least important units of models that may have been cut before.

    Args:
        models: The models by node. They are not changed.
        survivors: The units of the dense models that they hold.
        kept: Units kept after the cut, by node and block.
        scores: Importance of the units that the models have now.

    Returns:
        The smaller models, and the units of the dense models that these hold.
    """
    smaller_models: dict[str, Model] = {}
    smaller_survivors: Survivors = {}
    for node_name, model in models.items():
        units = choose_units(kept[node_name], model.blocks, scores=scores[node_name])
        smaller_models[node_name] = copy_without_units(model, units).eval()
        smaller_survivors[node_name] = dict(survivors[node_name])
        # The indices are those of the model as it is now, survivors those of the dense model.
        for block_name, kept_indices in units.items():
            old_units = survivors[node_name][block_name]
            smaller_survivors[node_name][block_name] = old_units[kept_indices]
    return smaller_models, smaller_survivors
