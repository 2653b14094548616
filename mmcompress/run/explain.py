"""What a run would do, told before anything runs: the graph, what may be cut, and what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmcompress.graph.blocks import Block, count_droppable_blocks
from mmcompress.graph.modality import propagate_modalities
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import (
    count_decode_steps,
    count_texts_per_request,
    sort_nodes,
)
from mmcompress.models.counts import count_params, count_params_and_macs
from mmcompress.run.measure_pace import measure_pace
from mmcompress.run.preflight import Needs, estimate_needs
from mmcompress.run.profile import Profile
from mmcompress.run.run_policy import RunPolicy
from mmcompress.run.wanted_work import describe_cut_run, describe_preparation, describe_rounds
from mmcompress.spec.space import Dimension
from mmcompress.spec.target import parse_target, split_targets
from mmcompress.workspace.context import RunContext

ASSUMED_DECODE_STEPS = 10.0
"""Decode steps of a request where none was measured: a short caption."""


@dataclass(frozen=True, kw_only=True)
class NodeRow:
    """One node of the graph."""

    name: str
    """Its name."""
    kind: str
    """Its kind."""
    source: str
    """Where its model comes from; empty for joins."""
    reads: str
    """What its ports read."""
    modalities: str
    """Modalities of its outputs."""
    params_m: float | None
    """Millions of parameters; None for joins."""
    share: float | None
    """Share of the request, 0..1: of its latency where that is known, else of the
    multiply-adds."""
    asked_ms: float | None
    """Milliseconds that the first target leaves to it where every node gets faster alike; None: not
    known."""


@dataclass(frozen=True, kw_only=True)
class CutRow:
    """Units of one kind in one node."""

    node: str
    """The node."""
    group: str
    """Kind of unit: heads, channels, positions."""
    blocks: int
    """Blocks that have such units."""
    units: int
    """Units of all of them."""
    allowed: str
    """What the search may cut, in words."""
    cross_modal: int
    """Blocks among them that are cross-modal."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a run would do."""

    nodes: tuple[NodeRow, ...]
    """The nodes, in the order in which they run."""
    cuts: tuple[CutRow, ...]
    """What may be cut, node by node."""
    reasons: dict[str, tuple[str, ...]]
    """Cross-modal blocks by the reason."""
    protection: str
    """How much less cross-modal units are cut, in words."""
    needs: Needs
    """Memory and disk that the run will take."""
    expected_times: tuple[str, ...]
    """How long the run will take at the pace of this machine, in sentences."""
    is_measured: bool
    """Whether shares are of latencies that were measured, not of multiply-adds."""


def explain_run(
    run: RunContext, dense: Profile | None, *, max_seconds: float | None = None
) -> Explanation:
    """Tell what a run would do.

    Args:
        run: The opened run; a training step and an evaluation of it are timed.
        dense: The profile of the dense pipeline from an earlier run; None: there is none. Shares
            are then those of multiply-adds, at a guessed number of decode steps.
        max_seconds: Seconds that the run may take; None: there is no limit.

    Raises:
        SpecError: The time is too short whatever is cut.
    """
    return Explanation(
        nodes=tuple(_list_nodes(run, dense)),
        cuts=tuple(_list_cuts(run)),
        reasons=_group_reasons(run),
        protection=_describe_protection(run),
        needs=estimate_needs(run),
        expected_times=_list_expected_times(run, max_seconds),
        is_measured=dense is not None,
    )


def _list_expected_times(run: RunContext, max_seconds: float | None) -> tuple[str, ...]:
    """List how long the stages of a run take, by the pace of this machine now."""
    pace = measure_pace(run, None)
    policy = RunPolicy()
    sentences = [*describe_rounds(run.spec, pace, policy=policy), describe_preparation(pace)]
    if max_seconds is not None:
        sentences += describe_cut_run(run.spec, pace, policy=policy, max_seconds=max_seconds)
    return tuple(sentences)


def _list_nodes(run: RunContext, dense: Profile | None) -> Iterable[NodeRow]:
    """List the nodes with their shares of a request."""
    modalities = propagate_modalities(run.spec)
    shares = _measure_shares(run, dense)
    params = {name: count_params(model) for name, model in run.models.items()}
    for name in sort_nodes(run.spec):
        node = run.spec.nodes[name]
        asked_ms = None
        if dense is not None and name in dense.nodes:
            goal = parse_target(split_targets(run.spec)[0])
            target_ms = goal.compute_target_ms(dense.latency_ms)
            asked_ms = dense.nodes[name].p50 * target_ms / dense.latency_ms.p50
        yield NodeRow(
            name=name,
            kind=node.kind,
            source=node.source,
            reads=", ".join(f"{port}: {source}" for port, source in node.inputs.items()),
            modalities="+".join(sorted(modalities[name])),
            params_m=params[name] / 1e6 if name in params else None,
            share=shares.get(name),
            asked_ms=asked_ms,
        )


def _measure_shares(run: RunContext, dense: Profile | None) -> dict[str, float]:
    """Return the share of every model in a request, by node."""
    if dense is not None:
        return {name: ms.p50 / dense.latency_ms.p50 for name, ms in dense.nodes.items()}
    calls: dict[str, float] = {}
    for name in run.models:
        loop_graph = get_kind(run.spec.nodes[name].kind).loop_graph
        if loop_graph:
            calls[f"{name}/{loop_graph}"] = ASSUMED_DECODE_STEPS
    steps = count_decode_steps(run.spec, calls)
    texts = count_texts_per_request(run.spec)
    macs: dict[str, int] = {}
    for name, model in run.models.items():
        _, macs[name] = count_params_and_macs(model, steps[name], beams=texts[name])
    total = max(sum(macs.values()), 1)
    return {name: count / total for name, count in macs.items()}


def _list_cuts(run: RunContext) -> Iterable[CutRow]:
    """List what may be cut, by node and kind of unit."""
    for node_name, blocks in run.blocks.items():
        groups = dict.fromkeys(block.group for block in blocks)
        for group in groups:
            members = [block for block in blocks if block.group == group]
            units = sum(block.units for block in members)
            cross_modal = sum(block.name in run.cross_modal[node_name] for block in members)
            yield CutRow(
                node=node_name,
                group=group,
                blocks=len(members),
                units=units,
                allowed=_describe_allowed(run, node_name, group=group, blocks=members),
                cross_modal=cross_modal,
            )


def _describe_allowed(
    run: RunContext, node_name: str, *, group: str, blocks: Sequence[Block]
) -> str:
    """Tell what the search may cut of some blocks, in words."""
    ratio = run.space.dimensions.get(f"nodes.{node_name}.prune.{group}")
    drop = run.space.dimensions.get(f"nodes.{node_name}.prune.drop")
    parts = [_describe_ratio(ratio)]
    can_drop = any(block.drop for block in blocks)
    if can_drop and drop is not None and drop.high:
        most = min(int(drop.high), count_droppable_blocks(run.blocks[node_name]))
        parts.append(f"up to {most} sub-layers of the node")
    return ", ".join(part for part in parts if part) or "nothing is searched"


def _describe_ratio(dimension: Dimension | None) -> str:
    """Tell the range of a pruning ratio, in words; empty where it is not searched."""
    if dimension is None:
        return ""
    return f"{dimension.low or 0:.0%} to {dimension.high or 0:.0%} of the units"


def _group_reasons(run: RunContext) -> dict[str, tuple[str, ...]]:
    """Group the cross-modal layers by the reason. A layer that is no block is never cut."""
    reasons: dict[str, list[str]] = {}
    for node_name, layers in run.cross_modal.items():
        blocks = {block.name for block in run.blocks[node_name]}
        for layer_name, reason in layers.items():
            described = layer_name if layer_name in blocks else f"{layer_name} (never cut)"
            reasons.setdefault(f"{node_name}: {reason}", []).append(described)
    return {reason: tuple(names) for reason, names in reasons.items()}


def _describe_protection(run: RunContext) -> str:
    """Tell how much less cross-modal units are cut, in words."""
    dimension = run.space.dimensions.get("prune.protection")
    if dimension is not None:
        return f"{dimension.low or 1:g} to {dimension.high or 1:g} times less, as the search finds"
    factor = run.spec.prune.protection
    return f"{factor:g} times less" if factor > 1 else "as much as the others"
