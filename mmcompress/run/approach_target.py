"""Propose and measure structures in turn, until one lies just under the target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Attempt, BoundKind, Trial
from mmcompress.results.target_met import find_worst_ratio, list_node_bounds
from mmcompress.run.fitted_structure import MIN_TARGET_SHARE, FitTolerances
from mmcompress.run.near_precisions import correct_by_comparisons
from mmcompress.run.structure_benchmark import MIN_MARGIN, StructureBenchmark
from mmcompress.runtime.progress import StageProgress
from mmcompress.search.build_problem import AIMED_SHARE
from mmcompress.search.run_search import FULL_BUDGET_SHARE
from mmcompress.spec.schema import Limits

MAX_ALLOWED_MARGIN = 0.02
"""Share of the target: the most that a structure stays below it for a measurement that may be off.
"""

ALIKE_LATENCY_SHARE = 0.05
"""Relative difference of two predictions up to which both are taken to err by the same factor. So
the measurement of one structure tells of the other."""

WEIGHT_OF_OTHERS = 0.5
"""Weight of the measurement of another structure, against that of the structure itself."""

CLEAR_MISS = 0.05
"""Share of the target: how far a measurement lies outside the accepted range when no second look
could bring it inside."""


class Propose(Protocol):
    """Gives the structure to measure next."""

    def __call__(self, predictor: Predictor, budget_ms: float, /, attempt: int) -> Trial | None:
        """Return the best structure within a budget, or the nearest one; None where there is none.

        Args:
            predictor: Predicts latency, corrected by what was measured so far.
            budget_ms: Milliseconds a request.
            attempt: The number of structures that were measured before.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ApproachOptions:
    """What a structure has to meet."""

    target_ms: float
    """Milliseconds a request."""
    limits: Limits
    """Limits beside the target; those of single nodes count here."""
    final_to_fitted: float
    """Expected latency of the finished artifact / latency of its structure before training."""
    first_attempt: int
    """Number of structures that were measured for earlier artifacts."""
    reference_runs: Path
    """The file of the measurements of reference pipelines."""
    tolerances: FitTolerances
    """How exactly a structure must measure."""
    dense_node_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of each node of the dense pipeline. Without it, all nodes are corrected alike.
    """
    learned_corrections: dict[str, float] = field(default_factory=dict)
    """What earlier fits corrected the nodes of the same predictor by. The first prediction uses it.
    """


@dataclass(frozen=True, kw_only=True)
class FitAttempt:
    """A structure, with what was predicted and measured of it."""

    trial: Trial
    """The structure as it was proposed."""
    predicted_ms: float
    """Milliseconds a request, as predicted before the measurement."""
    benchmark: StructureBenchmark
    """The measurement."""
    measured_ms: float
    """Milliseconds that the finished artifact is expected to take, by this measurement alone."""
    bounded_ms: float
    """The same; where a node exceeds its own limit, the target exceeded by the same ratio, if that
    is more."""
    expected_ms: float
    """As `bounded_ms`, with what was measured of structures of nearly the same latency."""

    @property
    def allowed_margin(self) -> float:
        """The margin that is kept to both ends of the accepted range, as a share of the target.

        It is at most `MAX_ALLOWED_MARGIN`: a wider one would leave no range, and less of the
        budget would be used.
        """
        return min(self.benchmark.margin, MAX_ALLOWED_MARGIN)

    @property
    def upper_share(self) -> float:
        """The most that is accepted, as a share of the target."""
        return 1 - self.allowed_margin

    def lower_share(self, tolerances: FitTolerances) -> float:
        """Return the least that is accepted, as a share of the target.

        It leaves half the margin over the share that a finished artifact must reach, for that is
        measured anew.
        """
        width_bound = self.upper_share - tolerances.accepted_width
        margin_bound = MIN_TARGET_SHARE + self.allowed_margin / 2
        return min(max(width_bound, margin_bound), self.upper_share - MIN_MARGIN)

    def compute_target_share(self, target_ms: float) -> float:
        """Return expected latency / target."""
        return self.expected_ms / target_ms

    def is_accepted(self, options: ApproachOptions) -> bool:
        """Return whether the structure lies just under the target."""
        share = self.compute_target_share(options.target_ms)
        return self.lower_share(options.tolerances) <= share <= self.upper_share

    def to_record(self, target_ms: float) -> Attempt:
        """Return what the summary tells of the attempt."""
        return Attempt(
            predicted_ms=self.predicted_ms,
            measured_ms=self.bounded_ms,
            target_ms=target_ms,
            margin=self.benchmark.margin,
            node_ratios=self.benchmark.node_ratios,
        )


@dataclass(frozen=True, kw_only=True)
class ApproachResult:
    """How an approach ended."""

    attempts: tuple[FitAttempt, ...]
    """Everything that was measured, in order; empty where nothing was proposed."""
    predictor: Predictor
    """The predictor with its last correction."""
    node_corrections: dict[str, float]
    """What the nodes of the first predictor were corrected by."""
    exhausted: bool
    """The last structure measures below the accepted range, and the search has nothing larger
    within the target."""
    learned_corrections: dict[str, float] = field(default_factory=dict)
    """What the next fit corrects the nodes of the first predictor by: the last measurement counts
    as well."""


def approach_target(
    propose: Propose,
    predictor: Predictor,
    *,
    options: ApproachOptions,
    measure: Callable[[Candidate, float], StructureBenchmark],
    progress: StageProgress,
) -> ApproachResult:
    """Propose and measure structures in turn. A miss corrects the prediction of the next one.

    Args:
        propose: Gives the structure to measure next.
        predictor: Predicts latency.
        options: What a structure has to meet.
        measure: Measures a candidate; its second argument is the predicted latency in milliseconds.
        progress: Receives what each structure measures.
    """
    target_ms = options.target_ms
    budget_ms = target_ms * AIMED_SHARE
    attempts: list[FitAttempt] = []
    exhausted = False
    first_predictor = predictor
    node_corrections: dict[str, float] = {}
    if options.learned_corrections:
        predictor = first_predictor.correct_nodes(options.learned_corrections)
    for number in range(options.tolerances.max_attempts):
        trial = propose(predictor, budget_ms, attempt=options.first_attempt + number)
        if trial is None or any(
            trial.candidate == earlier_attempt.trial.candidate for earlier_attempt in attempts
        ):
            break
        predicted_ms = predictor(trial.candidate)
        attempts.append(
            FitAttempt(
                trial=trial,
                predicted_ms=predicted_ms,
                benchmark=measure(trial.candidate, predicted_ms),
                measured_ms=0.0,
                bounded_ms=0.0,
                expected_ms=0.0,
            )
        )
        # The reference runs have grown: all structures are compared at the same speed of the
        # machine.
        attempts = [_update_latency(attempt, options) for attempt in attempts]
        attempts = expect_latencies(attempts, predictor, options=options)
        last = attempts[-1]
        progress(_describe_measurement(last, target_ms=target_ms), None)
        first_predictor = correct_by_comparisons(
            first_predictor, trial.candidate, comparisons=last.benchmark.other_precisions
        )
        if last.is_accepted(options) and not last.benchmark.has_free_fp32:
            exhausted = False
            break
        is_too_fast = last.compute_target_share(target_ms) < last.lower_share(options.tolerances)
        exhausted = is_too_fast and predicted_ms < FULL_BUDGET_SHARE * budget_ms
        if exhausted:
            break
        if number > 0 and trial.latency_ms > budget_ms:
            # Nothing is predicted to be fast enough.
            break
        predictor, node_corrections = _learn_corrections(attempts, first_predictor, options=options)
    return ApproachResult(
        attempts=tuple(attempts),
        predictor=predictor,
        node_corrections=node_corrections,
        exhausted=exhausted,
        learned_corrections=_average_node_corrections(attempts, first_predictor, options=options),
    )


def _learn_corrections(
    attempts: list[FitAttempt], predictor: Predictor, *, options: ApproachOptions
) -> tuple[Predictor, dict[str, float]]:
    """Return the predictor that all measurements correct, and what its nodes are corrected by.

    Args:
        attempts: What was measured so far.
        predictor: The predictor before any correction.
        options: The latencies of the dense nodes.
    """
    node_corrections = _average_node_corrections(attempts, predictor, options=options)
    if node_corrections:
        predictor = predictor.correct_nodes(node_corrections)
    correction = _average_corrections(attempts, predictor, options=options)
    return replace(predictor, correction=correction), node_corrections


def is_clear_miss(target_share: float) -> bool:
    """Return whether a measurement is so far off the target that another structure is needed.

    Such a structure is not measured any longer: all it has to tell is the direction.

    Args:
        target_share: Measured latency / target.
    """
    return not MIN_TARGET_SHARE - CLEAR_MISS <= target_share <= 1 + CLEAR_MISS


def _describe_measurement(attempt: FitAttempt, *, target_ms: float) -> str:
    """Say what a structure measures, and what is expected where others were measured before."""
    message = (
        f"measured {attempt.bounded_ms:.2f} ms at the machine's pace of the profile, "
        f"target {target_ms:.2f} ms, give or take {attempt.benchmark.margin:.1%}"
    )
    if attempt.expected_ms == attempt.bounded_ms:
        return message
    return f"{message}; {attempt.expected_ms:.2f} ms with the structures before"


def _update_latency(attempt: FitAttempt, options: ApproachOptions) -> FitAttempt:
    """Return an attempt with its latency at the average speed of the machine so far."""
    benchmark = attempt.benchmark
    long_run_ms = benchmark.estimate_long_run_ms(options.reference_runs)
    measured_ms = options.final_to_fitted * long_run_ms
    bounded_ms = max(measured_ms, benchmark.worst_limit_ratio * options.target_ms)
    return replace(attempt, measured_ms=measured_ms, bounded_ms=bounded_ms)


def expect_latencies(
    attempts: list[FitAttempt], predictor: Predictor, *, options: ApproachOptions
) -> list[FitAttempt]:
    """Return the attempts with what is expected of each, from all measurements.

    Two measurements of one structure differ by some percent. Between structures of nearly the same
    latency the predictor hardly errs, so each of them tells of the others. With the predictions p
    and the measurements m,

        expected_i = p_i * exp(sum over j of w_ij * log(m_j / p_j) / sum over j of w_ij)

    where w is 1 for the structure itself, `WEIGHT_OF_OTHERS` for those within
    `ALIKE_LATENCY_SHARE` of its prediction, and else 0.
    """
    predictions = [predictor(attempt.trial.candidate) for attempt in attempts]
    updated: list[FitAttempt] = []
    for i, attempt in enumerate(attempts):
        weighted_errors = 0.0
        weights = 0.0
        for j, other in enumerate(attempts):
            weight = 1.0 if i == j else WEIGHT_OF_OTHERS
            if abs(predictions[j] / predictions[i] - 1) <= ALIKE_LATENCY_SHARE:
                weighted_errors += weight * math.log(other.measured_ms / predictions[j])
                weights += weight
        expected_ms = attempt.measured_ms
        if weights > 1:
            expected_ms = predictions[i] * math.exp(weighted_errors / weights)
        limit_ms = attempt.benchmark.worst_limit_ratio * options.target_ms
        updated.append(replace(attempt, expected_ms=max(expected_ms, limit_ms)))
    return updated


def _average_node_corrections(
    attempts: list[FitAttempt], predictor: Predictor, *, options: ApproachOptions
) -> dict[str, float]:
    """Return what each node measured / what was predicted of it, as weighted means over attempts.

    Measurements are taken relative to the dense pipeline that answered in turn. So the speed of
    the machine is no part of them.

    Args:
        attempts: What was measured so far.
        predictor: The predictor before any correction.
        options: The latencies of the dense nodes.
    """
    if not attempts:
        return {}
    corrections: dict[str, float] = {}
    for node_name, dense_ms in options.dense_node_ms.items():
        errors: list[float] = []
        for attempt in attempts:
            ratio = attempt.benchmark.node_ratios.get(node_name)
            if ratio is None or node_name not in predictor.fits:
                continue
            predicted_ms = predictor.predict_node_ms(node_name, attempt.trial.candidate)
            if predicted_ms > 0:
                errors.append(ratio * dense_ms * predictor.correction / predicted_ms)
        if len(errors) == len(attempts):
            corrections[node_name] = _average_by_weight(errors)
    return corrections


def _average_corrections(
    attempts: list[FitAttempt], predictor: Predictor, *, options: ApproachOptions
) -> float:
    """Return the mean of the corrections that would have been right.

    Args:
        attempts: What was measured so far.
        predictor: The predictor, with its nodes corrected.
        options: The limits of nodes.
    """
    return _average_by_weight(
        [_find_right_correction(attempt, predictor, options=options) for attempt in attempts]
    )


def _average_by_weight(values: list[float]) -> float:
    """Return the geometric mean of values, where each weighs twice as much as the one before.

    One measurement on a busy machine must not swing the search. Later ones are nearer to the
    target.
    """
    weighted_sum = 0.0
    weights = 0.0
    for i, value in enumerate(values):
        weight = 2.0**i
        weighted_sum += weight * math.log(value)
        weights += weight
    return math.exp(weighted_sum / weights)


def _find_right_correction(
    attempt: FitAttempt, predictor: Predictor, *, options: ApproachOptions
) -> float:
    """Return the correction of the predictor that would have been right about a structure."""
    candidate = attempt.trial.candidate
    error = attempt.measured_ms / predictor(candidate)
    if attempt.benchmark.worst_limit_ratio > 1:
        # The next structure must bring the node within its limit, if it is predicted as wrongly as
        # this one.
        def predict_node_ms(kind: BoundKind, node_name: str) -> float:
            return predictor.predict_node_ms(node_name, candidate)

        predicted_ratio = find_worst_ratio(list_node_bounds(options.limits, predict_node_ms))
        error = max(error, attempt.benchmark.worst_limit_ratio / predicted_ratio)
    return predictor.correction * error
