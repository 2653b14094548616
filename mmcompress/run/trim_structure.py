"""Stage: after a small miss, take a few units off the finished structure. Nothing is searched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Summary
from mmcompress.results.target_met import (
    compute_long_run_target_share,
    compute_target_share,
    find_worst_limit_ratio,
)
from mmcompress.run.fitted_structure import MIN_TARGET_SHARE, FittedStructure
from mmcompress.run.next_artifact import Retry
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.search.build_problem import build_problem
from mmcompress.search.repair import cut_to_budget
from mmcompress.spec.schema import Limits
from mmcompress.storage import read_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

MAX_TRIMMED_MISS = 0.05
"""Share of the target that a finished artifact may exceed it by to be trimmed. A larger miss is
searched for anew: too many units would go for the training that is left."""

TRIMMED_TARGET_SHARE = (MIN_TARGET_SHARE + 1) / 2
"""Latency / target that a trimmed structure is aimed at: the middle of the accepted range."""


@dataclass(frozen=True, kw_only=True)
class MissedArtifact:
    """A finished artifact that missed its target by a little."""

    fitted: FittedStructure
    """Its structure."""
    target_share: float
    """Measured latency / target, above 1."""
    long_run_share: float
    """The same as it is in the long run on this machine; at least 1. A machine that was slow for
    some minutes would else cost units."""


def find_small_miss(folder: RunFolder, limits: Limits) -> MissedArtifact | None:
    """Return the best artifact so far when it missed its target by a little and no limit.

    Args:
        folder: The folder of the target.
        limits: Limits beside the target.
    """
    earlier = folder.find_earlier()
    if earlier is None:
        return None
    summary = read_record(Summary, earlier.summary)
    target_share = compute_target_share(summary)
    misses_a_limit = find_worst_limit_ratio(limits, summary.compressed) > 1
    if misses_a_limit or not 1 < target_share <= 1 + MAX_TRIMMED_MISS:
        return None
    fitted = read_record(FittedStructure, earlier.fitted)
    return MissedArtifact(
        fitted=fitted,
        target_share=target_share,
        long_run_share=max(compute_long_run_target_share(summary), 1.0),
    )


def trim_structure(
    run: RunContext, prepared: PreparedRun, *, plan: Retry, effort: int
) -> FittedStructure | None:
    """Take units off the artifact that missed its target by a little.

    What was measured of the finished artifact corrects the prediction, so nothing is measured
    before the training.

    Args:
        run: The run with one target.
        prepared: The predictor and the sensitivity that the targets share.
        plan: How the next artifact is made.
        effort: Trials and level switches that are asked of a search.

    Returns:
        The structure. None where no artifact missed by a little, or where no unit can be taken off.
        None too where the proof of what is left failed before.
    """
    missed_target = None if run.device_readings else find_small_miss(run.folder, run.spec.limits)
    if missed_target is None or missed_target.fitted.search_effort < effort:
        return None
    earlier = missed_target.fitted
    dense_latency = prepared.dense.latency_ms
    target_ms = run.goal.compute_target_ms(dense_latency)
    corrected_nodes = prepared.predictor.correct_nodes(earlier.node_corrections)
    predictor = replace(corrected_nodes, p95_ratio=run.goal.compute_p95_ratio(dense_latency))
    predictor = _correct_by_measurement(
        predictor, earlier.candidate, measured_ms=missed_target.long_run_share * target_ms
    )
    smaller = _cut_units(run, prepared, predictor=predictor, structure=earlier.candidate)
    if smaller is None or smaller == earlier.candidate or smaller.make_key() in plan.excluded:
        return None
    predicted_ms = predictor(smaller)
    run.on_progress(
        "fit",
        f"the finished artifact lies at {missed_target.target_share:.1%} of its target. A few "
        f"units are taken off it (predicted {predicted_ms:.2f} ms), nothing is searched",
        None,
    )
    return replace(
        earlier,
        candidate=smaller,
        predicted_ms=predicted_ms,
        measured_ms=predicted_ms,
        target_ms=target_ms,
        correction=predictor.correction,
        final_to_fitted=plan.final_to_fitted,
        writing_factor=plan.writing_factor,
        exhausted=False,
        is_trimmed=True,
        choice_reason=(
            f"An earlier artifact lay at {missed_target.target_share:.1%} of the target. This is "
            "its structure with a few units less, and its training went on."
        ),
    )


def _correct_by_measurement(
    predictor: Predictor, candidate: Candidate, *, measured_ms: float
) -> Predictor:
    """Return a predictor that predicts of a candidate what was measured of it."""
    factor = measured_ms / predictor(candidate)
    return replace(predictor, correction=predictor.correction * factor)


def _cut_units(
    run: RunContext, prepared: PreparedRun, *, predictor: Predictor, structure: Candidate
) -> Candidate | None:
    """Return a structure with fewer units and the same precisions; None where none can go."""
    target_ms = run.goal.compute_target_ms(prepared.dense.latency_ms)
    problem = build_problem(
        run,
        prepared.sensitivity,
        predictor=predictor,
        budget_ms=TRIMMED_TARGET_SHARE * target_ms,
    )
    # In another precision it would be another structure.
    problem = replace(problem, precisions={})
    return cut_to_budget(
        problem, structure, loss_increase=prepared.sensitivity.estimate_loss_increase
    )
