"""A structure measured as a whole export beside the dense pipeline, before anything is trained."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.drift import (
    ReferenceRuns,
    append_reference_run,
    load_reference_runs,
)
from mmcompress.measure.cost_model.fit_predictor import compute_paired_node_ratios
from mmcompress.measure.cost_model.plan import DENSE_NAME
from mmcompress.measure.latency.bench import (
    MAX_REQUESTS_FACTOR,
    Samples,
    has_time_budget,
    split_by_counts,
)
from mmcompress.results.records import BoundKind
from mmcompress.results.target_met import find_worst_ratio, list_node_bounds
from mmcompress.run.near_precisions import PrecisionComparison, change_precisions
from mmcompress.run.profile import Profile, bench_beside_dense
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.sensitivity.store import Sensitivity, select_fp32_blocks
from mmcompress.stats import estimate_relative_margin
from mmcompress.workspace.context import RunContext

MIN_MARGIN = 0.01
"""Share of the target: the least that a measurement may be off by."""

MAX_MARGIN = 0.04
"""Share of the target: the most that the tail of a p95 is taken to be off by."""

WANTED_MARGIN = 0.015
"""Share of the target below which a structure is not loaded and measured once more."""

PARTS_OF_ONE_LOAD = 4
"""Parts of a single load whose ratios are compared, where there is no time for several loads."""

NORMAL_QUANTILE_95 = 1.96
"""Standard errors in half of an interval of 95 %."""

MARGIN_BOOTSTRAP_DRAWS = 500
"""Resamples that the margin of a p95 is estimated from: enough for its first two digits."""

STRUCTURE_NAME = "new"
"""The name of the structure among the bundles that are measured in turn."""

OTHER_NAME = "other"
"""The name of the same structure with some nodes in another precision."""

NO_PRECISIONS: Mapping[str, str] = MappingProxyType({})
"""No node is measured in another precision."""


@dataclass(frozen=True, kw_only=True)
class ReferenceComparison:
    """A structure beside whole pipelines that answered the same requests in turn.

    A busy machine slows a quantized model differently from one in fp32, by up to a tenth and for
    minutes. So each node is compared with the whole node in the same precision. On one shared
    machine, this ratio had a spread (one sigma) of 0.6 % from measurement to measurement. The ratio
    to the dense pipeline had one of 2.4 %.
    """

    references: dict[str, str]
    """The precision of the whole node that each node is compared with."""
    ratio: float
    """Latency of the structure / latency of these whole nodes: median over requests."""
    dense_ms: float
    """Milliseconds of the dense pipeline at the pace of the profile. For a p95, as much longer as
    the structure's tail is longer than the dense one."""

    def estimate_long_run_ms(self, reference_runs: ReferenceRuns) -> float:
        """Return what the structure takes at the average speed of the machine so far."""
        return self.ratio * reference_runs.average_all_nodes(self.references) * self.dense_ms


@dataclass(frozen=True, kw_only=True)
class StructureBenchmark:
    """The measurement of a structure."""

    ms: float
    """Milliseconds a request, to compare with the target: for a speed-up, at the pace of the
    profile."""
    worst_limit_ratio: float
    """Measured latency / its own limit, of the worst node; 0 where no node has a limit."""
    margin: float
    """Share of the target: what the measurement may be off by."""
    node_ratios: dict[str, float]
    """Latency of each node / latency of the same node of the dense pipeline."""
    comparison: ReferenceComparison | None = None
    """How it compares with whole pipelines; None where the target is in milliseconds."""
    other_precisions: dict[str, PrecisionComparison] = field(default_factory=dict)
    """Nodes that were measured in another precision as well."""

    @property
    def has_free_fp32(self) -> bool:
        """Whether a node was no slower in fp32 than in its own precision."""
        return any(
            comparison.precision == DENSE_NAME and comparison.ratio <= 1
            for comparison in self.other_precisions.values()
        )

    def estimate_long_run_ms(self, reference_runs: Path) -> float:
        """Return `ms` at the average speed of the machine, so that structures can be compared.

        Args:
            reference_runs: The file of the reference runs.
        """
        if self.comparison is None:
            return self.ms
        return self.comparison.estimate_long_run_ms(load_reference_runs(reference_runs))


def measure_structure(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    candidate: Candidate,
    dense: Profile,
    is_enough: Callable[[float], bool] | None = None,
    near_precisions: Mapping[str, str] = NO_PRECISIONS,
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
        is_enough: Whether these milliseconds need not be known better. By default, a structure is
            measured until its margin is small, or the time for it is over.
        near_precisions: Precisions that some nodes are measured in as well, beside their own.
    """
    statistic = run.goal.statistic
    samples = _bench_structure(
        run,
        sensitivity,
        candidate=candidate,
        dense=dense,
        is_enough=is_enough,
        near_precisions=near_precisions,
    )
    other_samples = samples.pop(OTHER_NAME, None)
    references = choose_references(candidate.precision, samples)
    structure = samples[STRUCTURE_NAME].summarize()
    reference = samples[DENSE_NAME].summarize()
    profiled_ms: float = getattr(dense.latency_ms, statistic)
    ms: float = getattr(structure.latency, statistic)
    comparison = None
    if run.goal.kind == "speedup":
        whole_pipelines = {name: samples[name] for name in samples if name != STRUCTURE_NAME}
        append_reference_run(run.shared.reference_runs, whole_pipelines)
        tail = ms / structure.latency.p50
        dense_tail = getattr(reference.latency, statistic) / reference.latency.p50
        comparison = ReferenceComparison(
            references=references,
            ratio=statistics.median(compute_reference_ratios(samples, references)),
            dense_ms=profiled_ms * tail / dense_tail,
        )
        ms = _scale_to_profile(run, samples, dense=dense)

    def get_node_ms(kind: BoundKind, node_name: str) -> float:
        return structure.nodes[node_name].p50

    node_bounds = list_node_bounds(run.spec.limits, get_node_ms)
    return StructureBenchmark(
        ms=ms,
        worst_limit_ratio=find_worst_ratio(node_bounds),
        margin=estimate_margin(samples, references, statistic=statistic),
        node_ratios=compute_paired_node_ratios(samples[STRUCTURE_NAME], samples[DENSE_NAME]),
        comparison=comparison,
        other_precisions=_compare_precisions(
            samples[STRUCTURE_NAME], other_samples, near_precisions=near_precisions
        ),
    )


def _compare_precisions(
    own: Samples, other: Samples | None, *, near_precisions: Mapping[str, str]
) -> dict[str, PrecisionComparison]:
    """Compare nodes in two precisions, request by request; nothing where none was measured."""
    if other is None:
        return {}
    comparisons: dict[str, PrecisionComparison] = {}
    for node_name, precision in near_precisions.items():
        ratios = [
            other_ms / own_ms
            for other_ms, own_ms in zip(other.nodes[node_name], own.nodes[node_name], strict=True)
        ]
        comparisons[node_name] = PrecisionComparison(
            precision=precision, ratio=statistics.median(ratios)
        )
    return comparisons


def _bench_structure(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    candidate: Candidate,
    dense: Profile,
    is_enough: Callable[[float], bool] | None,
    near_precisions: Mapping[str, str],
) -> dict[str, Samples]:
    """Write the bundle of a structure and measure it in turn with the reference pipelines.

    Where some of its nodes are near in another precision, the structure with all of these
    precisions is measured in the same turns.
    """
    structures = {STRUCTURE_NAME: candidate}
    if near_precisions:
        structures[OTHER_NAME] = change_precisions(candidate, near_precisions)
    models = build_pruned_models(run, sensitivity, candidate=candidate, refit=False)
    bundles: dict[str, Path] = {}
    for name, structure in structures.items():
        bundles[name] = run.folder.scratch / name
        run.write_bundle(
            models,
            structure.precision,
            kept=structure.kept_units,
            folder=bundles[name],
            prove=False,
            fp32_blocks=select_fp32_blocks(sensitivity, structure),
        )
    # Of a large pipeline, the sessions need the memory of the models.
    del models
    statistic = run.goal.statistic

    def is_certain(samples: Mapping[str, Samples]) -> bool:
        if is_enough and is_enough(_scale_to_profile(run, samples, dense=dense)):
            return True
        references = choose_references(candidate.precision, samples)
        return estimate_margin(samples, references, statistic=statistic) <= WANTED_MARGIN

    samples = bench_beside_dense(
        run,
        {
            **bundles,
            DENSE_NAME: run.shared.baseline,
            **find_reference_bundles(run, candidate, dense=dense),
        },
        dense=dense,
        max_requests=MAX_REQUESTS_FACTOR * run.spec.measure.requests,
        is_certain=is_certain,
    )
    shutil.rmtree(run.folder.scratch, ignore_errors=True)
    return samples


def _scale_to_profile(run: RunContext, samples: Mapping[str, Samples], *, dense: Profile) -> float:
    """Return the milliseconds of a structure, for a speed-up at the pace of the profile."""
    statistic = run.goal.statistic
    ms: float = getattr(samples[STRUCTURE_NAME].summarize().latency, statistic)
    if run.goal.kind != "speedup":
        return ms
    dense_ms: float = getattr(samples[DENSE_NAME].summarize().latency, statistic)
    profiled_ms: float = getattr(dense.latency_ms, statistic)
    # A machine that is slower now is slower for both, though not equally.
    return ms * profiled_ms / dense_ms


def choose_references(
    precision: Mapping[str, str], samples: Mapping[str, Samples]
) -> dict[str, str]:
    """Return the whole pipeline that each node of a structure is compared with.

    Args:
        precision: The precision of every node that has a model.
        samples: What was observed of the structure and of whole pipelines, by precision.
    """
    references: dict[str, str] = {}
    for node_name in samples[STRUCTURE_NAME].nodes:
        wanted = precision.get(node_name, DENSE_NAME)
        references[node_name] = wanted if wanted in samples else DENSE_NAME
    return references


def compute_reference_ratios(
    samples: Mapping[str, Samples], references: Mapping[str, str]
) -> list[float]:
    """Return latency of a structure / latency of its whole nodes, request by request."""
    node_rows = [samples[precision].nodes[node] for node, precision in references.items()]
    ratios: list[float] = []
    for structure_ms, *whole_node_ms in zip(samples[STRUCTURE_NAME].ms, *node_rows, strict=True):
        ratios.append(structure_ms / sum(whole_node_ms))
    return ratios


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


def estimate_margin(
    samples: Mapping[str, Samples], references: Mapping[str, str], *, statistic: str = "p50"
) -> float:
    """Return what the latency of a structure / that of its references may be off by.

    It is the half-width of the interval of 95 % over the loads, each with its own ratio. Within a
    load, the requests share the speed of the machine and the places of the weights in memory.
    Of a p95 it is the larger of this one and that of the tail, which is bootstrapped over requests.

    Args:
        samples: What was observed of the structure and of whole pipelines.
        references: The precision of the whole node that each node is compared with.
        statistic: `p50` or `p95`.

    Returns:
        A share, at least `MIN_MARGIN`. The part of the tail is at most `MAX_MARGIN`.
    """
    ratios = compute_reference_ratios(samples, references)
    counts = samples[STRUCTURE_NAME].load_requests
    if len(counts) < 2:
        counts = [len(part) for part in np.array_split(ratios, PARTS_OF_ONE_LOAD)]
    load_ratios = [statistics.median(part) for part in split_by_counts(ratios, counts)]
    margin = max(estimate_relative_margin(load_ratios), MIN_MARGIN)
    if statistic == "p50":
        return margin
    return max(margin, _estimate_tail_margin(samples[STRUCTURE_NAME].ms, samples[DENSE_NAME].ms))


def _estimate_tail_margin(new: Sequence[float], old: Sequence[float]) -> float:
    """Return half of the interval of 95 % of the ratio of two p95s, at most `MAX_MARGIN`."""
    rows = np.random.default_rng(0).integers(0, len(new), (MARGIN_BOOTSTRAP_DRAWS, len(new)))
    new_p95s = np.percentile(np.asarray(new)[rows], 95, axis=1)
    old_p95s = np.percentile(np.asarray(old)[rows], 95, axis=1)
    p95_ratios = new_p95s / old_p95s
    margin = NORMAL_QUANTILE_95 * float(p95_ratios.std() / p95_ratios.mean())
    return min(margin, MAX_MARGIN)
