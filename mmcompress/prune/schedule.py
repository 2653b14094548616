"""When units go: all at once, or over rounds of pruning and training; and back to the first weights at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block, units_after
from mmcompress.graph.structure import KeptUnits
from mmcompress.models.base import Model
from mmcompress.prune.surgery import copy_without_units
from mmcompress.prune.units import choose_units

Survivors = dict[str, dict[str, Tensor]]
"""Units of the dense model that are left, by node and block."""


def plan_rounds(
    blocks: Mapping[str, Sequence[Block]], final: Mapping[str, KeptUnits], *, rounds: int
) -> list[dict[str, KeptUnits]]:
    """Units kept after each of `rounds`, the last being `final`; much at first, less and less (Zhu and Gupta 2017).

    The share of all cuts made by the end of round i of n is 1 - (1 - i / n)^3. What is dropped whole goes in the last.
    """
    found = []
    for i in range(1, rounds + 1):
        done = 1 - (1 - i / rounds) ** 3
        kept: dict[str, KeptUnits] = {}
        for n, bs in blocks.items():
            kept[n] = {}
            for b in bs:
                end = final[n].get(b.name, b.units)
                now = (
                    end
                    if i == rounds
                    else int(units_after(b, int(done * (b.units - end) / b.granularity)))
                )
                kept[n][b.name] = max(now, end, 0 if i == rounds else b.granularity)
        found.append(kept)
    return found


def all_units(blocks: Mapping[str, Sequence[Block]]) -> Survivors:
    return {n: {b.name: torch.arange(b.units) for b in bs} for n, bs in blocks.items()}


def narrow_models(
    models: Mapping[str, Model],
    survivors: Survivors,
    *,
    kept: Mapping[str, KeptUnits],
    scores: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, Model], Survivors]:
    """Models cut down to `kept`, the least important of their own units gone, and what that leaves of the dense ones.

    `scores`: of the units the models have now.
    """
    cut, left = {}, {}
    for n, m in models.items():
        units = choose_units(kept[n], m.blocks, scores=scores[n])
        cut[n] = copy_without_units(m, units).eval()
        left[n] = {b: s[units[b]] if b in units else s for b, s in survivors[n].items()}
    return cut, left
