"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import KeptUnits


def choose_units(
    kept: KeptUnits, blocks: Sequence[Block], *, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The most important units of each block (of an ordered one the first), sorted; whole blocks are left out."""
    best = lambda b: torch.sort(scores[b.name].topk(kept[b.name]).indices).values
    return {
        b.name: torch.arange(kept[b.name]) if b.prefix_only else best(b)
        for b in blocks
        if kept.get(b.name, b.units) < b.units
    }
