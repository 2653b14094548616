"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmcompress.measure.cost_model.device_table import DeviceTable
from mmcompress.measure.cost_model.plan import Export, MeasurementPlan, name_small_pipeline
from mmcompress.measure.cost_model.predictor import LinearFit, Predictor
from mmcompress.measure.latency.bench import PipelineLatency
from mmcompress.stats import Latency


@dataclass(frozen=True, kw_only=True)
class PipelineMeasurement:
    """A pipeline end to end: latency, its nodes, the share spent inside models, session calls per request, and the p50
    of the milliseconds inside the sessions of each node."""

    latency: Latency
    nodes: dict[str, Latency]
    model_share: float
    calls: dict[str, float]
    in_session_ms: dict[str, float]

    @classmethod
    def from_latency(cls, m: PipelineLatency) -> PipelineMeasurement:
        return cls(
            latency=m.latency,
            nodes=m.nodes,
            model_share=m.model_share,
            calls=m.calls,
            in_session_ms=m.in_session_ms,
        )


NodeRatios = Mapping[str, Mapping[str, float]]
"""Pipeline (a precision, or a smaller one in it) -> node: its time over that of the dense one beside it."""


def compute_node_ratios(found: Mapping[str, PipelineLatency]) -> dict[str, dict[str, float]]:
    """Of pipelines measured in turn, what each node takes over the same in fp32, by precision."""
    of = lambda p, n: found[p].nodes[n].p50 / found["fp32"].nodes[n].p50
    return {
        p: {n: of(p, n) for n, ms in found["fp32"].in_session_ms.items() if ms > 0}
        for p in found
        if p != "fp32"
    }


def fit_predictor(
    plan: MeasurementPlan,
    table: DeviceTable,
    *,
    exports: Sequence[Export],
    export_ms: Sequence[float],
    dense: PipelineMeasurement,
    node_ratios: NodeRatios,
) -> Predictor:
    """Base and scale of every node and precision, from the table and whole exports of `export_ms` milliseconds each.

    The prediction for the `dense` pipeline is exactly what was measured, as a whole and node by node; `node_ratios` holds
    every other precision, and small nodes, to what was measured of them inside a pipeline.
    """
    draft, rows = (
        Predictor(
            table=table,
            deployed=plan.deployed,
            fits={},
            overhead_ms=0.0,
            windows=plan.windows,
            reads=plan.reads,
        ),
        table.index_rows(),
    )
    affine: dict[str, dict[str, LinearFit]] = {}
    sizes: dict[str, dict[str, LinearFit]] = {}
    whole = {n: dense.nodes[n].p50 for n in plan.deployed}
    # A decode loop moves a cache about that is as large as the structure: where smaller pipelines were measured, what
    # is spent around the sessions of a node is part of its fit; but the features of a sound do not shrink.
    apart = lambda n: not plan.small_structures or (n in plan.windows and plan.windows[n].ordered)
    around = {
        n: max(whole[n] - dense.in_session_ms[n], 0.0) if apart(n) else 0.0 for n in plan.deployed
    }
    for n in plan.deployed:
        sizes[n], affine[n] = {}, {}
        for p in plan.precisions[n]:
            mine = [
                (e, t)
                for e, t in zip(exports, export_ms, strict=True)
                if e.node == n and e.precision == p
            ]
            raw = [
                draft.table_ms(n, e.kept_units, precision=p, rows=rows, cuts={n: e.cut_positions})
                for e, _ in mine
            ]
            a = LinearFit.fit(
                raw,
                [t for _, t in mine],
                left=[draft.compute_remaining_share(n, e.cut_positions) for e, _ in mine],
            )
            sizes[n][p] = LinearFit.fit([e.params_m for e, _ in mine], [e.size_mb for e, _ in mine])
            # Inside a pipeline sessions find colder caches, and the machine may have been slower then than now: both
            # show as a factor between the time in a node's sessions there and alone. The first export is the whole one.
            share = node_ratios[p][n] if p != "fp32" else 1.0
            spent = lambda rate, n=n: rate * dense.nodes[n].p50 - around[n]
            affine[n][p] = a.scaled(max(spent(share), 1e-3) / (a.base + a.scale * raw[0]))
            less = [
                (by[n], node_ratios[k][n])
                for name, by in plan.small_structures.items()
                if (k := name_small_pipeline(name, p)) in node_ratios
            ]
            if less:  # points from inside a pipeline beat those from alone
                sums = [
                    raw[0],
                    *(draft.table_ms(n, kept, precision=p, rows=rows) for kept, _ in less),
                ]
                left = [
                    len(plan.deployed[n]),
                    *(sum(kept[x.name] > 0 for x in plan.deployed[n]) for kept, _ in less),
                ]
                rates = (share, *(rate for _, rate in less))
                affine[n][p] = (
                    LinearFit.fit_in_pipeline(
                        sums, left, measured=[max(spent(rate), 1e-3) for rate in rates]
                    )
                    or affine[n][p]
                )
    return replace(
        draft,
        fits=affine,
        overhead_ms=dense.latency.p50 - draft.critical_path_ms(whole),
        size_fits=sizes,
        outside_sessions_ms=around,
    )
