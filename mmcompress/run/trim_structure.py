"""Stage: after a small miss, take a few units off the finished structure. Nothing is searched.

Where the units go is measured. The sensitivity of the dense pipeline says little about what a
trained structure can spare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Summary
from mmcompress.results.target_met import (
    compute_long_run_target_share,
    compute_target_share,
    find_worst_limit_ratio,
)
from mmcompress.run.compress.inherit_weights import inherit_weights
from mmcompress.run.compress.trained import load_trained_models
from mmcompress.run.fitted_structure import MIN_TARGET_SHARE, FittedStructure
from mmcompress.run.next_artifact import Retry
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.search.alternative_cuts import list_alternative_cuts
from mmcompress.search.build_problem import build_problem
from mmcompress.search.short_finetune import ValidationLoss
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

    folder: RunFolder
    """Where it lies, with its weights."""
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
        folder=earlier,
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
    cuts = [
        cut
        for cut in _list_cuts(run, prepared, predictor=predictor, structure=earlier.candidate)
        if cut != earlier.candidate and cut.make_key() not in plan.excluded
    ]
    if not cuts:
        return None
    run.on_progress(
        "fit",
        f"the finished artifact lies at {missed_target.target_share:.1%} of its target. A few "
        f"units are taken off it at the best of {len(cuts)} places, nothing is searched",
        None,
    )
    smaller = _choose_cut(run, prepared, cuts=cuts, missed=missed_target)
    predicted_ms = predictor(smaller)
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


def _list_cuts(
    run: RunContext, prepared: PreparedRun, *, predictor: Predictor, structure: Candidate
) -> list[Candidate]:
    """List structures with fewer units and the same precisions, the cheapest by estimate first."""
    target_ms = run.goal.compute_target_ms(prepared.dense.latency_ms)
    problem = build_problem(
        run,
        prepared.sensitivity,
        predictor=predictor,
        budget_ms=TRIMMED_TARGET_SHARE * target_ms,
    )
    # In another precision it would be another structure.
    problem = replace(problem, precisions={})
    return list_alternative_cuts(
        problem, structure, loss_increase=prepared.sensitivity.estimate_loss_increase
    )


def _choose_cut(
    run: RunContext, prepared: PreparedRun, *, cuts: Sequence[Candidate], missed: MissedArtifact
) -> Candidate:
    """Choose the cut whose models have the least loss with the weights of the finished artifact.

    Args:
        run: The run with one target.
        prepared: The sensitivity, by which the units of a block are chosen.
        cuts: Structures, at least one; the first of them where there are no weights.
        missed: The finished artifact that they are cut off.
    """
    if len(cuts) == 1 or not missed.folder.units.exists():
        return cuts[0]
    trained = load_trained_models(
        run, prepared.sensitivity, candidate=missed.fitted.candidate, folder=missed.folder
    )
    validation_loss = ValidationLoss(run)
    losses: list[float] = []
    for number, cut in enumerate(cuts, 1):
        if losses and run.is_search_over():
            # The cheapest by estimate come first.
            break
        run.on_progress("fit", f"measuring cut {number} of {len(cuts)}", number / len(cuts))
        inherited = inherit_weights(run, prepared.sensitivity, candidate=cut, trained=trained)
        losses.append(min(validation_loss.measure(models) for models in inherited.list_variants()))
    listed_losses = ", ".join(f"{loss:.3f}" for loss in losses)
    run.on_progress("fit", f"loss after each cut, before training: {listed_losses}", None)
    return cuts[losses.index(min(losses))]
