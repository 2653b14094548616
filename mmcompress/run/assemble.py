"""From measurements to the parts of the summary. No torch."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.devices.bundle_check import BundleCheck
from mmcompress.results.records import (
    Bound,
    FreeWriting,
    NodeResult,
    SearchResult,
    Side,
    Summary,
    Target,
    Trial,
)
from mmcompress.results.target_met import (
    list_exceeded_bounds,
    list_undetermined_limits,
    scale_latencies,
)
from mmcompress.run.warnings import list_warnings
from mmcompress.runtime.bundle import read_manifest
from mmcompress.runtime.environment import BYTES_PER_MB
from mmcompress.spec.schema import Spec
from mmcompress.spec.target import Goal, parse_target
from mmcompress.stats import Latency, Quality
from mmcompress.storage import build_record


@dataclass(frozen=True, kw_only=True)
class NodeSize:
    """How large one model is."""

    params: int
    """Parameters."""
    macs: int
    """Multiply-accumulate operations a request."""
    zero_share: float = 0.0
    """Share of zeros among the weights of its blocks."""


@dataclass(frozen=True, kw_only=True)
class RemovedShares:
    """What was removed of one model: shares of unit features, by weight."""

    unimodal: float | None
    """Of blocks that are not cross-modal; None where there are none."""
    cross_modal: float | None
    """Of cross-modal blocks; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class PredictedReach:
    """What the search space is predicted to reach at best, at the machine's speed at that time."""

    floor_ms: float
    """Milliseconds: the lowest latency of anything in the space."""
    fixed_ms: float
    """Milliseconds of the floor that no prunable block accounts for."""
    fixed_ms_by_node: Mapping[str, float]
    """The same by node."""
    lowest_reachable: Sequence[Bound]
    """Every limit beside the target; its value is the least of anything in the space."""


def assemble_side(
    spec: Spec,
    bundle: Path,
    *,
    measured: PipelineMeasurement,
    quality: dict[str, Quality],
    sizes: Mapping[str, NodeSize],
    removed: Mapping[str, RemovedShares],
    memory_mb: float,
) -> Side:
    """Return one side of the comparison.

    Args:
        spec: The spec of the run.
        bundle: The bundle of this side; file sizes and precisions are read from its manifest.
        measured: Its latency, as a whole and by node.
        quality: Its metrics.
        sizes: Parameters and operations by node.
        removed: What was removed, by node.
        memory_mb: Peak resident megabytes of a process that loads the bundle; 0 where it was
            not measured.
    """
    manifest = read_manifest(bundle)
    bytes_by_file = {file: entry["bytes"] for file, entry in manifest["files"].items()}
    nodes = {}
    for name in spec.list_model_nodes():
        node_bytes = 0
        for file, count in bytes_by_file.items():
            if file.startswith(f"{name}/"):
                node_bytes += count
        nodes[name] = NodeResult(
            latency_ms_p50=measured.nodes[name].p50,
            params=sizes[name].params,
            macs=sizes[name].macs,
            size_mb=node_bytes / BYTES_PER_MB,
            precision=manifest["graph"]["nodes"][name]["precision"],
            unimodal_ratio=removed[name].unimodal,
            cross_modal_ratio=removed[name].cross_modal,
            sparsity=sizes[name].zero_share,
        )
    return Side(
        latency_ms=measured.latency,
        quality=quality,
        size_mb=sum(bytes_by_file.values()) / BYTES_PER_MB,
        params=sum(size.params for size in sizes.values()),
        nodes=nodes,
        model_share=measured.model_share,
        memory_mb=memory_mb,
    )


def build_target(
    spec: Spec,
    *,
    goal: Goal,
    dense: Latency,
    compressed: Side,
    reach: PredictedReach,
    pace: float,
) -> Target:
    """Return what was asked for and whether the compressed side meets it.

    Args:
        spec: The spec of the run, with one target.
        goal: That target.
        dense: The latency of the dense pipeline, measured beside the compressed one.
        compressed: The compressed side.
        reach: What the search space is predicted to reach.
        pace: Latency now / latency when it was predicted: a busy machine is slower.
    """
    target_ms = goal.compute_target_ms(dense)
    exceeded_bounds = list_exceeded_bounds(spec, goal, target_ms=target_ms, side=compressed)
    dense_ms: float = getattr(dense, goal.statistic)
    return Target(
        latency_ms=target_ms,
        speedup=dense_ms / target_ms,
        met=not exceeded_bounds,
        text=spec.target,
        statistic=goal.statistic,
        floor_ms=pace * reach.floor_ms,
        fixed_ms=pace * reach.fixed_ms,
        fixed_ms_by_node={node: pace * ms for node, ms in reach.fixed_ms_by_node.items()},
        lowest_reachable=scale_latencies(reach.lowest_reachable, pace),
        latency_ms_p50=target_ms if goal.statistic == "p50" else None,
        exceeded_bounds=exceeded_bounds,
        undetermined_limits=list_undetermined_limits(spec.limits, compressed),
    )


def replace_measurements(
    summary: Summary, check: BundleCheck, *, dense_identity: str, bundle_identity: str
) -> Summary:
    """Return a summary with the latencies that a device measured of its bundles.

    Args:
        summary: The summary of a run for that device.
        check: What the device measured.
        dense_identity: Hash of the models of the run's own dense bundle.
        bundle_identity: Hash of the models of its compressed bundle.

    Raises:
        DataError: The figures are of another device or of other bundles.
    """
    if check.device != summary.device:
        raise DataError(
            f"these figures are of another device ({check.device}) than the run is for "
            f"({summary.device})"
        )
    if check.dense != dense_identity or check.bundle != bundle_identity:
        raise DataError("these figures are of other bundles than this run's")
    # The settings may name entries of a plug-in, and the record checks all names.
    for plugin in summary.settings.get("plugins", ()):
        importlib.import_module(plugin)
    spec = build_record(Spec, summary.settings)
    baseline = _replace_side_latency(summary.baseline, check.baseline)
    compressed = _replace_side_latency(summary.compressed, check.compressed)
    old_target = summary.target
    goal = parse_target(spec.target)
    target_ms = goal.compute_target_ms(check.baseline.latency)
    pace = target_ms / old_target.latency_ms
    reach = PredictedReach(
        floor_ms=old_target.floor_ms,
        fixed_ms=old_target.fixed_ms,
        fixed_ms_by_node=old_target.fixed_ms_by_node,
        lowest_reachable=old_target.lowest_reachable,
    )
    adopted_summary = replace(
        summary,
        target=build_target(
            spec,
            goal=goal,
            dense=check.baseline.latency,
            compressed=compressed,
            reach=reach,
            pace=pace,
        ),
        baseline=baseline,
        compressed=compressed,
        speedup=check.baseline.latency.p50 / check.compressed.latency.p50,
        cpu=check.cpu,
        predicted_latency_ms_p50=pace * summary.predicted_latency_ms_p50,
        machine_speed_factor=1.0,
        writing=FreeWriting(),
    )
    return replace(adopted_summary, warnings=list_warnings(adopted_summary))


def _replace_side_latency(side: Side, measured: PipelineMeasurement) -> Side:
    """Return one side with other latencies."""
    nodes = {}
    for name, node in side.nodes.items():
        nodes[name] = replace(node, latency_ms_p50=measured.nodes[name].p50)
    return replace(side, latency_ms=measured.latency, nodes=nodes, model_share=measured.model_share)


def summarize_search(
    trials: Sequence[Trial], failed: int, *, target_ms: float, seconds: float
) -> SearchResult:
    """Return how many trials there were, and who evaluated them.

    Args:
        trials: The finished trials, each architecture once.
        failed: The number of trials that failed.
        target_ms: The target in milliseconds a request.
        seconds: The time that the search took.
    """
    workers = Counter(trial.worker for trial in trials if trial.worker)
    return SearchResult(
        trials=len(trials),
        feasible=sum(trial.latency_ms <= target_ms for trial in trials),
        failed=failed,
        seconds=seconds,
        workers=dict(workers),
    )
