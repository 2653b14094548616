"""Structures of artifacts as rows of a table. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate


def describe_structure(
    candidate: Candidate, blocks: Mapping[str, Sequence[Block]]
) -> dict[str, str]:
    """Describe what a structure keeps of every node: its precision, its units, what is dropped.

    Args:
        candidate: The structure.
        blocks: The prunable blocks of the dense models, by node.

    Returns:
        A text by node: `int8; 0.attention 2/4, 0.ffn 16/32; dropped: 1.ffn`.
    """
    texts = {}
    for node_name, node_blocks in blocks.items():
        kept = candidate.kept_units.get(node_name, {})
        parts = [candidate.precision.get(node_name, "fp32")]
        cut = []
        dropped = []
        for block in node_blocks:
            units = kept.get(block.name, block.units)
            if units == 0:
                dropped.append(block.name)
            else:
                cut.append(f"{block.name} {units}/{block.units}")
        if cut:
            parts.append(", ".join(cut))
        if dropped:
            parts.append(f"dropped: {', '.join(dropped)}")
        texts[node_name] = "; ".join(parts)
    return texts
