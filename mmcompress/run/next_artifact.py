"""Whether another artifact is made after a finished one, and which of two is kept. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmcompress.results.records import Summary
from mmcompress.results.target_met import (
    compute_corrected_target_share,
    compute_long_run_target_share,
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
    search_effort: int
    """Trials and level switches. Artifacts of a shorter search do not count."""

    @classmethod
    def from_spec(cls, spec: Spec) -> ArtifactLimits:
        """Return the limits that a spec asks for."""
        return cls(
            bounds=spec.limits,
            max_artifacts=spec.search.max_artifacts,
            search_effort=spec.search.trials + spec.search.level_switches,
        )


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How the next artifact is made."""

    final_to_fitted: float
    """Expected latency of the finished artifact / latency of its structure before training."""
    bounds: Limits
    """Limits to search with: an exceeded one is lowered by the ratio it was exceeded by."""
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
        if reached_share >= MIN_TARGET_SHARE:
            return Done(reason="the artifact lies just within its bounds")
        if last.fitted.aimed_share < MIN_TARGET_SHARE:
            return Done(reason="the search has nothing larger within the target")
        if finished >= limits.max_artifacts:
            return Done(reason="no further artifact is allowed (search.max_artifacts)")
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
    final_to_fitted = 1.0
    bounds = limits.bounds
    first_attempt = 0
    for artifact in history:
        reached_share = compute_long_run_target_share(artifact.summary)
        final_to_fitted = artifact.fitted.next_final_to_fitted(
            reached_share, margin=artifact.summary.latency_margin
        )
        bounds = tighten_limits(bounds, limits.bounds, side=artifact.summary.compressed)
        first_attempt += len(artifact.fitted.attempts)
    return Retry(final_to_fitted=final_to_fitted, bounds=bounds, first_attempt=first_attempt)


def is_better(one: Summary, other: Summary) -> bool:
    """Return whether one of two artifacts for a target is kept rather than the other.

    The first rule that tells the two apart decides:

    1. One meets the target and the other misses it: the one that meets it is kept.
    2. Their latencies differ by no more than their margins: the one that lost less is kept.
    3. Both miss it: the faster one is kept.
    4. One is both faster and lost less: it is kept.
    5. One uses at least `MIN_TARGET_SHARE` of the target, the other less: the first is kept.
    6. The one that lost less is kept.
    """
    if one.target.met != other.target.met:
        return one.target.met
    latency_difference = compute_target_share(other) - compute_target_share(one)
    if abs(latency_difference) <= one.latency_margin + other.latency_margin:
        return _get_final_loss(one) < _get_final_loss(other)
    if not one.target.met:
        return latency_difference > 0
    loss_difference = _get_final_loss(other) - _get_final_loss(one)
    if latency_difference * loss_difference > 0:
        # One of the two is both faster and milder.
        return latency_difference > 0
    one_is_near = compute_corrected_target_share(one) >= MIN_TARGET_SHARE
    other_is_near = compute_corrected_target_share(other) >= MIN_TARGET_SHARE
    if one_is_near != other_is_near:
        return one_is_near
    return loss_difference > 0


def _get_final_loss(summary: Summary) -> float:
    """Return the validation loss after training; 0 where it was not measured."""
    return summary.validation_losses[-1] if summary.validation_losses else 0.0
