"""Fit the latency predictor to measurements: whole exports, and pipelines in a few variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from mmcompress.graph.structure import KeptUnits
from mmcompress.measure.cost_model.device_table import DeviceTable
from mmcompress.measure.cost_model.plan import (
    DENSE_NAME,
    Export,
    MeasurementPlan,
    name_small_pipeline,
)
from mmcompress.measure.cost_model.predictor import LinearFit, Predictor
from mmcompress.measure.latency.bench import PipelineLatency, Samples
from mmcompress.stats import Latency

MIN_SESSION_MS = 1e-3
"""Milliseconds that the sessions of a node take at least. Noise may leave a tiny node none, and a
fit divides by it."""


@dataclass(frozen=True, kw_only=True)
class PipelineMeasurement:
    """What was measured of a whole pipeline."""

    latency: Latency
    """Of a request, end to end."""
    nodes: dict[str, Latency]
    """Of each node."""
    model_share: float
    """Share of a request that is spent inside sessions, 0..1."""
    calls: dict[str, float]
    """Session calls per request, by `node/graph`."""
    in_session_ms: dict[str, float]
    """p50 of the milliseconds inside the sessions of each node."""

    @classmethod
    def from_latency(cls, pipeline: PipelineLatency) -> PipelineMeasurement:
        """Keep the figures of a benchmark, without its samples and traces."""
        return cls(
            latency=pipeline.latency,
            nodes=pipeline.nodes,
            model_share=pipeline.model_share,
            calls=pipeline.calls,
            in_session_ms=pipeline.in_session_ms,
        )


NodeRatios = Mapping[str, Mapping[str, float]]
"""Milliseconds of a node / those of the dense one measured in turn with it, by pipeline and node.

A pipeline is named by its precision, or by `name_small_pipeline`.
"""


def compute_node_ratios(samples: Mapping[str, Samples]) -> dict[str, dict[str, float]]:
    """Divide the latency of every node by that of the same node in the dense pipeline.

    Args:
        samples: What was observed of pipelines that answered the same requests in turn, by name;
            the dense one is `DENSE_NAME`.

    Returns:
        Ratios by pipeline and node, for nodes that run a model.
    """
    dense = samples[DENSE_NAME]
    model_nodes = {node for node, session_ms in dense.in_session.items() if median(session_ms) > 0}
    ratios: dict[str, dict[str, float]] = {}
    for name, pipeline in samples.items():
        if name != DENSE_NAME:
            paired_ratios = compute_paired_node_ratios(pipeline, dense)
            ratios[name] = {node: paired_ratios[node] for node in model_nodes & set(paired_ratios)}
    return ratios


def compute_paired_node_ratios(pipeline: Samples, dense: Samples) -> dict[str, float]:
    """Return latency of each node / latency of the dense node: medians over requests.

    Requests differ in their length. The ratio of two medians would compare a request with another
    one.
    """
    node_ratios: dict[str, float] = {}
    for node_name, node_ms in pipeline.nodes.items():
        pairs = zip(node_ms, dense.nodes[node_name], strict=True)
        ratios = [ms / dense_ms for ms, dense_ms in pairs if dense_ms > 0]
        if ratios:
            node_ratios[node_name] = median(ratios)
    return node_ratios


def fit_predictor(
    plan: MeasurementPlan,
    table: DeviceTable,
    *,
    exports: Sequence[Export],
    export_ms: Sequence[float],
    dense: PipelineMeasurement,
    node_ratios: NodeRatios,
) -> Predictor:
    """Fit base and scale of every node and precision.

    For a node n in a precision p, with the table sum T of a structure and W of the whole node:

        1. exports, alone:     export_ms = remaining_share * base + scale * T
        2. in a pipeline:      S(ratio) = ratio * dense_n - outside_n
        3. scaled to its place: base and scale are multiplied by S(ratio_p) / (base + scale * W)
        4. smaller pipelines:  S(ratio) = base + scale * T + per_block * blocks_left

    S are the milliseconds in the sessions of n; `ratio` is node_ratios[pipeline][n]. Step 4
    replaces step 3 where smaller pipelines were measured, and the whole node is one of its points.

    Sessions inside a pipeline find colder caches, and the machine may be slower at another time.
    Both show as the factor of step 3.

    Args:
        plan: Blocks, precisions and smaller structures.
        table: Rows for every need of the plan.
        exports: Nodes exported whole; the first one of a node and precision is the dense structure.
        export_ms: Milliseconds per request in the sessions of each export.
        dense: The dense pipeline.
        node_ratios: What each node took in every other precision, and in smaller pipelines.

    Returns:
        A predictor that gives back exactly what was measured of the dense pipeline, as a whole and
        node by node.
    """
    draft = Predictor(
        table=table,
        deployed=plan.deployed,
        fits={},
        overhead_ms=0.0,
        windows=plan.windows,
        reads=plan.reads,
    )
    dense_node_ms = {node: dense.nodes[node].p50 for node in plan.deployed}
    outside_sessions_ms = _measure_outside_sessions(plan, dense)
    fits: dict[str, dict[str, LinearFit]] = {}
    size_fits: dict[str, dict[str, LinearFit]] = {}
    for node in plan.deployed:
        fits[node] = {}
        size_fits[node] = {}
        for precision in plan.precisions[node]:
            timed_exports = _select_exports(exports, export_ms, node=node, precision=precision)
            size_fits[node][precision] = _fit_size(timed_exports)
            fits[node][precision] = _fit_node(
                draft,
                plan,
                node=node,
                precision=precision,
                timed_exports=timed_exports,
                node_ratios=node_ratios,
                dense_ms=dense_node_ms[node],
                outside_ms=outside_sessions_ms[node],
            )
    overhead_ms = measure_overhead(dense, list(plan.deployed))
    return replace(
        draft,
        fits=fits,
        overhead_ms=overhead_ms,
        request_factor=dense.latency.p50 / (draft.combine_node_ms(dense_node_ms) + overhead_ms),
        size_fits=size_fits,
        outside_sessions_ms=outside_sessions_ms,
    )


def measure_overhead(dense: PipelineMeasurement, nodes: Sequence[str]) -> float:
    """Return the milliseconds of a request that belong to no node with a model.

        overhead = outside all sessions - sum over n of (node_n - in its sessions)

    All terms are small. The request minus its nodes is a difference of large medians. On a machine
    that changes its pace, the noise of that would be taken for a cost.

    Args:
        dense: The dense pipeline.
        nodes: Its nodes that have a model.
    """
    outside_ms = (1 - dense.model_share) * dense.latency.p50
    for node in nodes:
        outside_ms -= max(dense.nodes[node].p50 - dense.in_session_ms[node], 0.0)
    return max(outside_ms, 0.0)


def _measure_outside_sessions(
    plan: MeasurementPlan, dense: PipelineMeasurement
) -> dict[str, float]:
    """Return the milliseconds of every node that its fit leaves out, since they don't depend on its
    structure.

    A decode loop moves a cache that is as large as the structure. So what a node spends outside its
    sessions is part of its fit, where smaller pipelines were measured. Only the features of a sound
    never get smaller.
    """
    outside_sessions_ms: dict[str, float] = {}
    for node in plan.deployed:
        reads_sound = node in plan.windows and plan.windows[node].prefix_only
        if plan.small_structures and not reads_sound:
            outside_sessions_ms[node] = 0.0
        else:
            outside_ms = dense.nodes[node].p50 - dense.in_session_ms[node]
            outside_sessions_ms[node] = max(outside_ms, 0.0)
    return outside_sessions_ms


@dataclass(frozen=True, kw_only=True)
class _TimedExport:
    """An export, and the milliseconds that a request spends in its sessions."""

    export: Export
    """What was exported: node, structure and precision."""
    ms: float
    """Milliseconds per request in its sessions."""


def _select_exports(
    exports: Sequence[Export], export_ms: Sequence[float], *, node: str, precision: str
) -> list[_TimedExport]:
    """Select the exports of one node in one precision."""
    selected_exports: list[_TimedExport] = []
    for export, ms in zip(exports, export_ms, strict=True):
        if export.node == node and export.precision == precision:
            selected_exports.append(_TimedExport(export=export, ms=ms))
    return selected_exports


def _fit_size(timed_exports: Sequence[_TimedExport]) -> LinearFit:
    """Fit the megabytes of exports to their millions of parameters."""
    params_m = [timed_export.export.params_m for timed_export in timed_exports]
    size_mb = [timed_export.export.size_mb for timed_export in timed_exports]
    return LinearFit.fit_line(params_m, size_mb)


def _fit_node(
    draft: Predictor,
    plan: MeasurementPlan,
    *,
    node: str,
    precision: str,
    timed_exports: Sequence[_TimedExport],
    node_ratios: NodeRatios,
    dense_ms: float,
    outside_ms: float,
) -> LinearFit:
    """Fit one node in one precision: the steps of `fit_predictor`."""
    alone_table_ms = [
        _sum_export_table(draft, timed_export.export, precision=precision)
        for timed_export in timed_exports
    ]
    alone_fit = _fit_exports(draft, timed_exports, table_ms=alone_table_ms)
    whole_table_ms = alone_table_ms[0]
    # A node that a request does not run has no ratio, and costs next to nothing in any structure.
    whole_ratio = 1.0
    if precision != DENSE_NAME:
        whole_ratio = node_ratios[precision].get(node, 1.0)
    whole_session_ms = _convert_to_session_ms(whole_ratio, dense_ms, outside_ms=outside_ms)
    whole_alone_ms = alone_fit.base + alone_fit.scale * whole_table_ms
    fit_in_place = alone_fit.multiply(whole_session_ms / whole_alone_ms)

    table_ms = [whole_table_ms]
    block_counts = [len(plan.deployed[node])]
    session_ms = [whole_session_ms]
    for name, structure in plan.small_structures.items():
        pipeline = name_small_pipeline(name, precision)
        if node not in node_ratios.get(pipeline, {}):
            continue
        kept_units = structure[node]
        ratio = node_ratios[pipeline][node]
        table_ms.append(
            draft.predict_table_ms(
                node, kept_units, precision=precision, rows=draft.table.index_rows()
            )
        )
        block_counts.append(_count_left_blocks(plan, node, kept_units=kept_units))
        session_ms.append(_convert_to_session_ms(ratio, dense_ms, outside_ms=outside_ms))
    if len(session_ms) == 1:
        return fit_in_place
    # points from inside a pipeline are better than those from exports alone
    fit_in_pipeline = LinearFit.fit_in_pipeline(table_ms, block_counts, measured_ms=session_ms)
    return fit_in_pipeline or fit_in_place


def _fit_exports(
    draft: Predictor, timed_exports: Sequence[_TimedExport], *, table_ms: Sequence[float]
) -> LinearFit:
    """Fit base and scale to exports that were timed alone."""
    base_shares: list[float] = []
    for timed_export in timed_exports:
        export = timed_export.export
        base_shares.append(draft.compute_remaining_share(export.node, export.cut_positions))
    export_ms = [timed_export.ms for timed_export in timed_exports]
    return LinearFit.fit_line(table_ms, export_ms, base_shares=base_shares)


def _sum_export_table(draft: Predictor, export: Export, *, precision: str) -> float:
    """Sum the table over the blocks of an export."""
    return draft.predict_table_ms(
        export.node,
        export.kept_units,
        precision=precision,
        rows=draft.table.index_rows(),
        cuts={export.node: export.cut_positions},
    )


def _convert_to_session_ms(ratio: float, dense_ms: float, *, outside_ms: float) -> float:
    """Return the milliseconds in a node's sessions, from its ratio to the dense node."""
    return max(ratio * dense_ms - outside_ms, MIN_SESSION_MS)


def _count_left_blocks(plan: MeasurementPlan, node: str, *, kept_units: KeptUnits) -> int:
    """Count the blocks of a node that have units left."""
    return sum(kept_units[block.name] > 0 for block in plan.deployed[node])
