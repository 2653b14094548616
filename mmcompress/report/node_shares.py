"""How the latency budget was split: what each node gave up, in figures and in words. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from mmcompress.results.records import Summary

LEAST_TOLD_SHARE = 0.005
"""Share of the parameters of a node below which none count as removed."""


@dataclass(frozen=True, kw_only=True)
class NodeShare:
    """What one node gave up for the target."""

    node: str
    """The node."""
    dense_share: float
    """Its share of the time of all nodes before."""
    saved_share: float
    """Its share of the milliseconds that all nodes saved together."""
    latency_ratio: float
    """Its latency after / before."""
    reason: str
    """What made it faster, and what was spared in it."""


def list_node_shares(summary: Summary) -> list[NodeShare]:
    """List what each node gave up.

    Args:
        summary: The run. A node without a figure of latency is left out.
    """
    dense = summary.baseline.nodes
    compressed = summary.compressed.nodes
    names = [name for name, node in dense.items() if node.latency_ms_p50 > 0]
    dense_ms = sum(dense[name].latency_ms_p50 for name in names)
    saved_ms = sum(dense[name].latency_ms_p50 - compressed[name].latency_ms_p50 for name in names)
    shares: list[NodeShare] = []
    for name in names:
        node_ms = dense[name].latency_ms_p50
        node_saved_ms = node_ms - compressed[name].latency_ms_p50
        shares.append(
            NodeShare(
                node=name,
                dense_share=node_ms / dense_ms,
                saved_share=node_saved_ms / saved_ms if saved_ms > 0 else 0.0,
                latency_ratio=compressed[name].latency_ms_p50 / node_ms,
                reason=_describe_cuts(summary, name),
            )
        )
    return shares


def _describe_cuts(summary: Summary, name: str) -> str:
    """Describe what was done to a node: precision, dropped sub-layers, protected layers."""
    before = summary.baseline.nodes[name]
    after = summary.compressed.nodes[name]
    kept_units = summary.kept_units.get(name, {})
    blocks = summary.blocks.get(name, ())
    parts: list[str] = []
    if after.precision != before.precision:
        parts.append(f"{after.precision} in place of {before.precision}")
    dropped = [block.name for block in blocks if kept_units.get(block.name, block.units) == 0]
    if dropped:
        parts.append(f"dropped: {', '.join(dropped)}")
    cut = summary.position_cuts.get(name)
    if cut:
        parts.append(f"{cut.kept} of {cut.of} positions kept")
    removed_share = 1 - after.params / before.params if before.params else 0.0
    if removed_share >= LEAST_TOLD_SHARE:
        parts.append(f"{removed_share:.0%} of its parameters removed")
    unimodal = after.unimodal_ratio
    cross_modal = after.cross_modal_ratio
    if (
        unimodal is not None
        and cross_modal is not None
        and cross_modal < unimodal - LEAST_TOLD_SHARE
    ):
        parts.append(
            f"cross-modal layers were spared ({cross_modal:.0%} of their units, of others "
            f"{unimodal:.0%})"
        )
    return "; ".join(parts) or "nothing"
