"""Whether another artifact is made after a finished one, and which of two is kept. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmcompress.results.records import Summary
from mmcompress.results.target_met import (
    compute_corrected_target_share,
    compute_dictated_target_share,
    compute_target_share,
    find_worst_limit_ratio,
    is_out_of_reach,
    tighten_limits,
)
from mmcompress.run.fitted_structure import MIN_TARGET_SHARE, FittedStructure
from mmcompress.spec.schema import Limits, Spec


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One finished artifact: the structure it was made of, and its measured record."""

    fitted: FittedStructure
    """The structure before training."""
    summary: Summary
    """Latency, quality and sizes after training."""


@dataclass(frozen=True, kw_only=True)
class ArtifactLimits:
    """What the policy needs of a spec."""

    bounds: Limits
    """Limits beside the target, as they were asked for."""
    max_artifacts: int
    """Artifacts at most, unless a single one misses: a miss is tried once more in any case."""
    bounds_trials: bool = False
    """Whether the trials of all rounds together are bounded. Being faster than asked is no reason
    for another round then."""
    search_effort: int
    """Trials and level switches. Artifacts of a shorter search do not count."""

    @classmethod
    def from_spec(cls, spec: Spec) -> ArtifactLimits:
        """Return the limits that a spec asks for."""
        return cls(
            bounds=spec.limits,
            max_artifacts=spec.search.max_artifacts,
            bounds_trials=spec.search.max_trials > 0,
            search_effort=spec.search.trials + spec.search.level_switches,
        )


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How the next artifact is made."""

    final_to_fitted: float
    """Expected latency of the finished artifact / latency of its structure before training."""
    bounds: Limits
    """Limits to search with: an exceeded one is lowered by the ratio it was exceeded by."""
    writing_factor: float = 1.0
    """The part of `final_to_fitted` that longer texts than the dense ones account for."""
    first_attempt: int
    """Number of structures measured for earlier artifacts; the search goes on from there."""
    excluded: tuple[str, ...] = ()
    """Keys of structures that are not made again: their proof failed."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """No further artifact is made."""

    reason: str
    """A sentence for a person."""


def next_step(history: Sequence[Artifact], limits: ArtifactLimits) -> Retry | Done:
    """Decide whether another artifact is made after the last one of a history.

    Args:
        history: All artifacts for the target, in the order they were made; at least one.
        limits: What the spec asks for.

    Returns:
        `Retry` says how the next artifact is made. `Done` comes in four cases:

        1. The last artifact lies just within its bounds.
        2. The search has nothing larger within the target.
        3. Nothing in the search space can meet the bounds.
        4. No further artifact is allowed.
    """
    last = history[-1]
    summary = last.summary
    reached_share = compute_corrected_target_share(summary)
    worst_ratio = find_worst_limit_ratio(limits.bounds, summary.compressed)
    finished = sum(item.fitted.search_effort >= limits.search_effort for item in history)
    if max(reached_share, worst_ratio) <= 1:
        # What lies nearer to the bound than it may be off by can't be told to be below it.
        if reached_share + summary.latency_margin >= MIN_TARGET_SHARE:
            return Done(reason="the artifact lies just within its bounds")
        if last.fitted.aimed_share < MIN_TARGET_SHARE:
            return Done(reason="the search has nothing larger within the target")
        if finished >= limits.max_artifacts:
            return Done(reason="no further artifact is allowed (search.max_artifacts)")
        if limits.bounds_trials:
            return Done(reason="trials are bounded, and the artifact is faster than asked")
        return plan_artifact(history, limits)
    lowest = summary.target.lowest_reachable
    if worst_ratio > 1 and is_out_of_reach(limits.bounds, summary.compressed, lowest=lowest):
        return Done(reason="nothing in the search space is predicted to meet a limit")
    if reached_share > 1 and summary.target.floor_ms > summary.target.latency_ms:
        return Done(reason="nothing in the search space is predicted to meet the target")
    # A miss is tried once more even where one artifact was asked for.
    if finished >= max(limits.max_artifacts, 2):
        return Done(reason="no further artifact is allowed (search.max_artifacts)")
    return plan_artifact(history, limits)


def plan_artifact(history: Sequence[Artifact], limits: ArtifactLimits) -> Retry:
    """Return how the next artifact is made, from what the earlier ones taught.

    Args:
        history: Earlier artifacts for the target, in the order they were made; may be empty.
        limits: What the spec asks for.
    """
    writing_factor = 1.0
    final_to_fitted = 1.0
    bounds = limits.bounds
    first_attempt = 0
    for artifact in history:
        reached = compute_dictated_target_share(artifact.summary)
        writing_factor = find_writing_factor(artifact.summary)
        final_to_fitted = writing_factor * artifact.fitted.next_final_to_fitted(
            reached, margin=artifact.summary.latency_margin
        )
        bounds = tighten_limits(bounds, limits.bounds, side=artifact.summary.compressed)
        first_attempt += len(artifact.fitted.attempts)
    return Retry(
        final_to_fitted=final_to_fitted,
        writing_factor=writing_factor,
        bounds=bounds,
        first_attempt=first_attempt,
    )


def find_writing_factor(summary: Summary) -> float:
    """Return the factor by which longer texts than the dense ones are expected to slow the next
    artifact.

    After a miss it counts as far as it exceeds its margin, or the next artifact would miss as
    well. What an artifact within the target wrote is no promise of the next one.
    """
    if compute_target_share(summary) <= 1:
        return 1.0
    excess = math.log(summary.writing.latency_factor) - summary.writing.margin
    return math.exp(max(excess, 0.0))


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Which of two artifacts is kept."""

    keeps_first: bool
    """Whether it is the first one."""
    reason: str
    """What the other one lacks, as a clause for a person."""


def is_better(one: Summary, other: Summary) -> bool:
    """Return whether one of two artifacts for a target is kept rather than the other."""
    return compare_artifacts(one, other).keeps_first


def explain_choice(winner: Summary, loser: Summary) -> str:
    """Return why an artifact was not kept, for a person.

    Args:
        winner: The artifact that was kept instead.
        loser: The one that was not.
    """
    preference = compare_artifacts(winner, loser)
    if not preference.keeps_first:
        return "the policy of the run prefers another artifact"
    return preference.reason


def compare_artifacts(one: Summary, other: Summary) -> Preference:
    """Return which of two artifacts for a target is kept, and why.

    The first rule that tells the two apart decides:

    1. One meets the target and the other misses it: the one that meets it is kept.
    2. Their latencies differ by no more than their margins: the one that lost less is kept.
    3. Both miss it: the faster one is kept.
    4. One is both faster and lost less: it is kept.
    5. One uses at least `MIN_TARGET_SHARE` of the target, the other less: the first is kept.
    6. The one that lost less is kept.
    """
    if one.target.met != other.target.met:
        return Preference(
            keeps_first=one.target.met, reason="it misses the target, and another artifact meets it"
        )
    losses = sorted([_get_final_loss(one), _get_final_loss(other)])
    lower_loss = (
        f"another artifact has the lower choosing loss ({losses[0]:.3f} for {losses[1]:.3f})"
    )
    faster_by = compute_target_share(other) - compute_target_share(one)
    if abs(faster_by) <= one.latency_margin + other.latency_margin:
        return Preference(
            keeps_first=_get_final_loss(one) < _get_final_loss(other),
            reason=f"{lower_loss}, and their latencies can't be told apart",
        )
    if not one.target.met:
        return Preference(
            keeps_first=faster_by > 0,
            reason="it misses the target by more than another artifact does",
        )
    milder_by = _get_final_loss(other) - _get_final_loss(one)
    if faster_by * milder_by > 0:
        return Preference(
            keeps_first=faster_by > 0,
            reason="another artifact is faster, and has the lower choosing loss",
        )
    one_is_near = compute_corrected_target_share(one) >= MIN_TARGET_SHARE
    other_is_near = compute_corrected_target_share(other) >= MIN_TARGET_SHARE
    if one_is_near != other_is_near:
        return Preference(
            keeps_first=one_is_near,
            reason=f"it takes less than {MIN_TARGET_SHARE:.0%} of the target: more was cut than "
            "needed",
        )
    return Preference(keeps_first=milder_by > 0, reason=lower_loss)


def _get_final_loss(summary: Summary) -> float:
    """Return the validation loss after training; 0 where it was not measured."""
    return summary.validation_losses[-1] if summary.validation_losses else 0.0
