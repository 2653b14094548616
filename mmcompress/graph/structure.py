"""A structure: the units that every block keeps, and the precision of every node."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mmcompress.graph.blocks import Block, count_steps, cut_by_share, cut_evenly

KeptUnits = dict[str, int]
"""Units kept per block of one node."""

Fp32Blocks = dict[str, dict[str, tuple[str, ...]]]
"""Names of blocks that stay in fp32 when their node is rounded, by node and precision."""


def find_fp32_blocks(fp32_blocks: Fp32Blocks, node: str, *, precision: str) -> tuple[str, ...]:
    """Find the blocks of a node that stay in fp32 when the node has some precision."""
    return fp32_blocks.get(node, {}).get(precision, ())


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A structure and the precision of each node: all that a trial decides."""

    kept_units: dict[str, KeptUnits]
    """Units kept, by node and block; a block that is not listed keeps all of them."""
    precision: dict[str, str]
    """Precision of each node."""

    def make_key(self) -> str:
        """Return a text that is the same for equal candidates."""
        return self._key

    @cached_property
    def _key(self) -> str:
        # A search compares a proposal with all that are under way.
        plain = {"kept_units": self.kept_units, "precision": self.precision}
        return json.dumps(plain, sort_keys=True)


def cut_each_block(blocks: Sequence[Block], share: float, *, cut_positions: int = 0) -> KeptUnits:
    """Cut the same share of each block of one node, rounded block by block.

    Args:
        blocks: The blocks of the node.
        share: Share of the steps of each block that is cut, 0 .. 1.
        cut_positions: Positions to cut (image patches, the end of an audio window).

    Returns:
        Units kept, by block.
    """
    kept_units: KeptUnits = {}
    for block in blocks:
        if block.group == "tokens":
            kept_units[block.name] = block.units - cut_positions
        else:
            kept_units[block.name] = cut_by_share(block, share)
    return kept_units


def cut_whole_pipeline(
    blocks: Mapping[str, Sequence[Block]], share: float, *, cut_positions: bool = False
) -> dict[str, KeptUnits]:
    """Cut the same share of every block of a pipeline, in one apportionment over all of them.

    The remainder goes block by block: blocks of one size that all lose a head together would jump
    over a target.

    Args:
        blocks: Blocks by node.
        share: Share of all steps that is cut, 0 .. 1.
        cut_positions: Whether positions (image patches, the end of an audio window) are cut by the
            same share.

    Returns:
        Units kept in every block, by node.
    """
    kept_units: dict[str, KeptUnits] = {}
    cut_nodes: list[str] = []
    cut_blocks: list[Block] = []
    for node_name, node_blocks in blocks.items():
        kept_units[node_name] = {block.name: block.units for block in node_blocks}
        for block in node_blocks:
            if cut_positions or block.group != "tokens":
                cut_nodes.append(node_name)
                cut_blocks.append(block)
    all_steps = sum(count_steps(block) for block in cut_blocks)
    left = cut_evenly(cut_blocks, round(share * all_steps))
    for node_name, block, units in zip(cut_nodes, cut_blocks, left, strict=True):
        kept_units[node_name][block.name] = units
    return kept_units


def measure_removed_share(
    kept: Mapping[str, KeptUnits],
    blocks: Mapping[str, Sequence[Block]],
    *,
    cross: Mapping[str, Collection[str]],
    crossing: bool,
) -> float | None:
    """Measure the share of units removed from the cross-modal (or the unimodal) blocks of the given
    nodes.

    Every unit counts with the parameters it carries: rows of its writers and columns of its reader.

    Args:
        kept: Units kept by node and block; a block that is not listed is whole.
        blocks: Blocks by node; those of nodes that `kept` lacks don't count.
        cross: Names of the cross-modal blocks, by node.
        crossing: Whether the cross-modal blocks are measured, or the others.

    Returns:
        The share removed, 0 .. 1; None where there are no such blocks.
    """
    whole_size = 0.0
    removed_size = 0.0
    for node_name, kept_units in kept.items():
        cross_modal_blocks = cross.get(node_name, ())
        for block in blocks[node_name]:
            carries_parameters = block.group != "tokens"
            if not carries_parameters or (block.name in cross_modal_blocks) != crossing:
                continue
            units_removed = block.units - kept_units.get(block.name, block.units)
            whole_size += block.units * block.rows_and_columns_per_unit
            removed_size += units_removed * block.rows_and_columns_per_unit
    return removed_size / whole_size if whole_size else None
