"""Measurements -> the parts of the summary, and the warnings the tool owes its user. No torch."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcompress.errors import DataError
from mmcompress.results.records import NodeResult, SearchResult, Side, Summary, Trial
from mmcompress.results.target import list_exceeded_bounds, scale_latencies
from mmcompress.run.warnings import list_warnings
from mmcompress.runtime.bundle import read_manifest
from mmcompress.spec.schema import Spec
from mmcompress.spec.target import parse_target
from mmcompress.stats import Quality
from mmcompress.storage import build_record

MB = 1e6


def assemble_side(
    spec: Spec,
    bundle: Path,
    *,
    measured: Any,
    quality: dict[str, Quality],
    counts: Mapping[str, tuple[int, int, float]],
    ratio: Mapping[str, tuple[float | None, float | None]],
    memory_mb: float,
) -> Side:
    """One side of the comparison from its bundle, its measurement, its counts and its ratios."""
    manifest = read_manifest(bundle)
    nodes = {}
    for name in spec.model_nodes():
        node = manifest["graph"]["nodes"][name]
        size = sum(e["bytes"] for f, e in manifest["files"].items() if f.startswith(f"{name}/"))
        unimodal, crossing = ratio[name]
        params, macs, zeros = counts[name]
        ms = measured.nodes[name].p50
        nodes[name] = NodeResult(
            latency_ms_p50=ms,
            params=params,
            macs=macs,
            size_mb=size / MB,
            precision=node["precision"],
            unimodal_ratio=unimodal,
            cross_modal_ratio=crossing,
            sparsity=zeros,
        )
    total = sum(e["bytes"] for e in manifest["files"].values()) / MB
    whole = sum(c[0] for c in counts.values())
    return Side(
        latency_ms=measured.latency,
        quality=quality,
        size_mb=total,
        params=whole,
        nodes=nodes,
        model_share=measured.model_share,
        memory_mb=memory_mb,
    )


def replace_measurements(s: Summary, check: Any, dense: str, bundle: str) -> Summary:
    """A summary with the latencies that a device measured of its bundles (`readings.Check`).

    `dense`, `bundle`: identities of the summary's own bundles. Raises `DataError` for figures of another device or of
    other bundles.
    """
    if check.device != s.device:
        raise DataError(
            f"these figures are of another device ({check.device}) than the run is for ({s.device})"
        )
    if (check.dense, check.bundle) != (dense, bundle):
        raise DataError("these figures are of other bundles than this run's")
    for plugin in s.settings.get("plugins", ()):
        importlib.import_module(plugin)
    spec = build_record(Spec, s.settings)
    goal = parse_target(s.target.asked)
    target_ms = goal.target_ms(check.baseline.latency)
    sides = []
    for have, m in ((s.baseline, check.baseline), (s.compressed, check.compressed)):
        nodes = {n: replace(r, latency_ms_p50=m.nodes[n].p50) for n, r in have.nodes.items()}
        sides.append(replace(have, latency_ms=m.latency, nodes=nodes, model_share=m.model_share))
    over = list_exceeded_bounds(spec, goal, target_ms=target_ms, side=sides[1])
    pace = (
        target_ms / s.target.latency_ms
    )  # it may be slower or faster now than when its readings were taken
    target = replace(
        s.target,
        floor_ms=pace * s.target.floor_ms,
        fixed_ms=pace * s.target.fixed_ms,
        fixed_ms_by_node={n: pace * ms for n, ms in s.target.fixed_ms_by_node.items()},
        lowest_reachable=scale_latencies(s.target.lowest_reachable, pace),
        latency_ms=target_ms,
        speedup=getattr(check.baseline.latency, goal.statistic) / target_ms,
        met=not over,
        exceeded_bounds=over,
        latency_ms_p50=target_ms if goal.statistic == "p50" else None,
    )
    speedup = check.baseline.latency.p50 / check.compressed.latency.p50
    predicted = pace * s.predicted_latency_ms_p50
    new = replace(
        s, target=target, baseline=sides[0], compressed=sides[1], speedup=speedup, cpu=check.cpu
    )
    new = replace(new, predicted_latency_ms_p50=predicted, machine_speed_factor=1.0)
    return replace(new, warnings=list_warnings(new))


def summarize_search(
    trials: Sequence[Trial], failed: int, *, target_ms: float, seconds: float
) -> SearchResult:
    feasible = sum(t.latency_ms <= target_ms for t in trials)
    return SearchResult(
        trials=len(trials),
        feasible=feasible,
        failed=failed,
        seconds=seconds,
        workers=dict(Counter(t.worker for t in trials if t.worker)),
    )
