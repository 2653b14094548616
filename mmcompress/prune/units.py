"""Which units of a block stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import KeptUnits
from mmcompress.models.device import CPU


def choose_units(
    kept: KeptUnits, blocks: Sequence[Block], *, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Choose the most important units of each block that is cut.

    Args:
        kept: How many units stay, by block. A block that is not listed stays whole.
        blocks: The blocks of one model.
        scores: Importance of the units by block, higher for what should stay.

    Returns:
        Sorted indices of the units that stay, for the blocks that lose some. Where only a prefix
        may stay, these are the first units.
    """
    units: dict[str, Tensor] = {}
    for block in blocks:
        count = kept.get(block.name, block.units)
        if count >= block.units:
            continue
        if block.prefix_only:
            units[block.name] = torch.arange(count, device=CPU)
        else:
            best_units = scores[block.name].topk(count).indices
            units[block.name] = torch.sort(best_units).values
    return units
