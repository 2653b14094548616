"""TODO."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmcompress.graph.blocks import Block
from mmcompress.storage import to_plain

KeptUnits = dict[str, int]
"""Units kept per block of one node."""


@dataclass(frozen=True)
class Candidate:
    """A structure and the precision of each node: all that a trial decides."""

    kept_units: dict[str, KeptUnits]
    precision: dict[str, str]

    def key(self) -> str:
        return json.dumps(to_plain(self), sort_keys=True)


def removed_share(
    kept: Mapping[str, KeptUnits],
    blocks: Mapping[str, Sequence[Block]],
    *,
    cross: Mapping[str, Mapping[str, str]],
    crossing: bool,
) -> float | None:
    """Share of unit features removed in the cross-modal (or unimodal) blocks of the given nodes, by weight.

    Every unit counts with the parameters it carries: rows of its writers and columns of its reader.
    """
    whole = cut = 0.0
    for node, units in kept.items():
        for b in blocks[node]:
            if (
                b.name in cross[node]
            ) != crossing or b.group == "tokens":  # positions carry no parameters
                continue
            whole += b.units * b.rows_and_columns_per_unit
            cut += (b.units - units.get(b.name, b.units)) * b.rows_and_columns_per_unit
    return cut / whole if whole else None
