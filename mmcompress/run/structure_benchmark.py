"""A structure measured as a whole export beside the dense pipeline, before anything is trained."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.drift import (
    append_reference_run,
    compute_machine_speed_factor,
    load_reference_runs,
)
from mmcompress.measure.cost_model.plan import DENSE_NAME
from mmcompress.measure.latency.bench import (
    MAX_REQUESTS_FACTOR,
    PipelineLatency,
    has_time_budget,
)
from mmcompress.results.records import BoundKind
from mmcompress.results.target_met import find_worst_ratio, list_node_bounds
from mmcompress.run.profile import Profile, bench_beside_dense
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.sensitivity.store import Sensitivity, select_fp32_blocks
from mmcompress.workspace.context import RunContext

MIN_MARGIN = 0.01
"""Share of the target: the least that a measurement may be off by. Loading a bundle anew leaves as
much open."""

MAX_MARGIN = 0.02
"""Share of the target: the most that a measured median may be off by; a p95 may be off by twice as
much."""

MARGIN_BOOTSTRAP_DRAWS = 500
"""Resamples that the margin of a p95 is estimated from: enough for its first two digits."""

STRUCTURE_NAME = "new"
"""The name of the structure among the bundles that are measured in turn."""


@dataclass(frozen=True, kw_only=True)
class StructureBenchmark:
    """The measurement of a structure."""

    ms: float
    """Milliseconds a request, to compare with the target: for a speed-up, at the speed of the
    profile."""
    worst_limit_ratio: float
    """Measured latency / its own limit, of the worst node; 0 where no node has a limit."""
    margin: float
    """Share of the target: what the measurement may be off by."""
    node_ratios: dict[str, float]
    """Latency of each node / latency of the same node of the dense pipeline."""
    node_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of each node."""
    run_index: int | None = None
    """Its place among the reference runs; None where the target is in milliseconds."""

    def estimate_long_run_ms(self, precision: Mapping[str, str], reference_runs: Path) -> float:
        """Return `ms` at the average speed of the machine, so that structures can be compared.

        Args:
            precision: The precision of every node.
            reference_runs: The file of the reference runs.
        """
        if self.run_index is None:
            return self.ms
        return self.ms * compute_machine_speed_factor(
            self.node_ms,
            precision,
            reference_runs=load_reference_runs(reference_runs),
            run_index=self.run_index,
        )


def measure_structure(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate, dense: Profile
) -> StructureBenchmark:
    """Measure a structure as a whole export.

    The structure and the dense pipeline get the same requests, and both write what the dense one
    does. Before its training a generator may write on and on; that does not make its structure
    slower.

    Args:
        run: The run.
        sensitivity: Chooses the units that are kept and the blocks that stay in fp32.
        candidate: The structure.
        dense: The profile of the dense pipeline.
    """
    latencies = _bench_structure(run, sensitivity, candidate=candidate, dense=dense)
    structure = latencies.pop(STRUCTURE_NAME)
    reference = latencies[DENSE_NAME]
    statistic = run.goal.statistic
    ms: float = getattr(structure.latency, statistic)
    run_index = None
    if run.goal.kind == "speedup":
        # A machine that is slower now is slower for both, though not equally.
        reference_runs = append_reference_run(run.shared.reference_runs, latencies)
        run_index = len(reference_runs.runs) - 1
        ms *= getattr(dense.latency_ms, statistic) / getattr(reference.latency, statistic)

    def get_node_ms(kind: BoundKind, node_name: str) -> float:
        return structure.nodes[node_name].p50

    node_bounds = list_node_bounds(run.spec.limits, get_node_ms)
    node_ratios = {}
    for node_name, latency in structure.nodes.items():
        dense_ms = reference.nodes[node_name].p50
        if dense_ms > 0:
            node_ratios[node_name] = latency.p50 / dense_ms
    return StructureBenchmark(
        ms=ms,
        worst_limit_ratio=find_worst_ratio(node_bounds),
        margin=estimate_margin(structure.samples, reference.samples, statistic=statistic),
        node_ratios=node_ratios,
        node_ms={node_name: latency.p50 for node_name, latency in structure.nodes.items()},
        run_index=run_index,
    )


def _bench_structure(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate, dense: Profile
) -> dict[str, PipelineLatency]:
    """Write the bundle of a structure and measure it in turn with the reference pipelines."""
    folder = run.folder.scratch
    models = build_pruned_models(run, sensitivity, candidate=candidate, refit=False)
    run.write_bundle(
        models,
        candidate.precision,
        kept=candidate.kept_units,
        folder=folder,
        prove=False,
        fp32_blocks=select_fp32_blocks(sensitivity, candidate),
    )
    # Of a large pipeline, the sessions need the memory of the models.
    del models
    latencies = bench_beside_dense(
        run,
        {
            STRUCTURE_NAME: folder,
            DENSE_NAME: run.shared.baseline,
            **find_reference_bundles(run, candidate, dense=dense),
        },
        dense=dense,
        max_requests=MAX_REQUESTS_FACTOR * run.spec.measure.requests,
    )
    shutil.rmtree(folder, ignore_errors=True)
    return latencies


def find_reference_bundles(
    run: RunContext, candidate: Candidate, *, dense: Profile
) -> dict[str, Path]:
    """Return the dense pipeline in every precision of a structure, where there is time.

    Args:
        run: The run.
        candidate: The structure.
        dense: The profile of the dense pipeline.

    Returns:
        The bundles by precision. Empty for a target in milliseconds, and for slow pipelines.
    """
    if run.goal.kind != "speedup" or not has_time_budget(dense.latency_ms.p50):
        return {}
    bundles = {}
    for precision in sorted(set(candidate.precision.values())):
        bundle = run.shared.quantized / precision
        if bundle.exists():
            bundles[precision] = bundle
    return bundles


def estimate_margin(new: Sequence[float], old: Sequence[float], *, statistic: str = "p50") -> float:
    """Return what the ratio of two pipelines may differ by when it is measured again.

    It is sqrt(2) standard errors, for both measurements are uncertain.
    For medians the standard error follows from the interquartile range of the ratios of pairs. For
    p95s it is bootstrapped; they are less certain.

    Args:
        new: Milliseconds of every request to the one pipeline.
        old: The same of the other, request by request.
        statistic: `p50` or `p95`.

    Returns:
        A share, between `MIN_MARGIN` and `MAX_MARGIN` (twice as much for a p95).
    """
    if statistic == "p50":
        ratios = [new_ms / old_ms for new_ms, old_ms in zip(new, old, strict=True)]
        quartile_1, _, quartile_3 = statistics.quantiles(ratios, n=4)
        # A normal distribution has an interquartile range of 1.349 sigma, and its median has a
        # standard error of 1.253 sigma / sqrt(n).
        sigma = (quartile_3 - quartile_1) / 1.349
        error = 1.253 * sigma / math.sqrt(len(ratios)) / statistics.median(ratios)
        margin = math.sqrt(2) * error
        return min(max(margin, MIN_MARGIN), MAX_MARGIN)
    rows = np.random.default_rng(0).integers(0, len(new), (MARGIN_BOOTSTRAP_DRAWS, len(new)))
    new_p95s = np.percentile(np.asarray(new)[rows], 95, axis=1)
    old_p95s = np.percentile(np.asarray(old)[rows], 95, axis=1)
    p95_ratios = new_p95s / old_p95s
    margin = math.sqrt(2) * float(p95_ratios.std() / p95_ratios.mean())
    return min(max(margin, MIN_MARGIN), 2 * MAX_MARGIN)
