"""TODO."""

from __future__ import annotations

from dataclasses import replace

from mmcompress.results.records import Summary
from mmcompress.results.target import (
    corrected_target_share,
    is_out_of_reach,
    target_share,
    worst_limit_ratio,
)
from mmcompress.run.fit import MIN_TARGET_SHARE, FittedStructure
from mmcompress.spec.schema import Limits
from mmcompress.workspace.context import RunContext


def _enough(r: RunContext, fitted: FittedStructure, *, summary: Summary, done: int) -> bool:
    """Whether an artifact ends the rounds, `done` of them: it lies just within its bounds, or as near as it was meant
    to; nothing in the search space is predicted to meet them; or none is left. A miss is tried again in any case."""
    limits, side, target = r.spec.limits, summary.compressed, summary.target
    reached, over = corrected_target_share(summary), worst_limit_ratio(limits, side)
    if max(reached, over) <= 1:
        return (
            reached >= MIN_TARGET_SHARE
            or fitted.aimed_share < MIN_TARGET_SHARE
            or done >= r.spec.search.max_artifacts
        )
    hopeless = over > 1 and is_out_of_reach(limits, side, lowest=target.lowest_reachable)
    return (
        hopeless
        or (reached > 1 and target.floor_ms > target.latency_ms)
        or done >= max(r.spec.search.max_artifacts, 2)
    )


def _within(r: RunContext, limits: Limits) -> RunContext:
    """The run under lower limits than it was asked for."""
    return r if limits == r.spec.limits else replace(r, spec=replace(r.spec, limits=limits))


def is_better(one: Summary, other: Summary) -> bool:
    """Whether one of two artifacts for a target is to be kept.

    What meets it comes first. Of two that do it is the one that is faster and lost no more, if one is both; else the
    one that uses up its target; then the one that lost less. Of two that don't it is the one that came nearer.
    """
    if one.target.met != other.target.met or not one.target.met:
        return one.target.met or (not other.target.met and target_share(one) < target_share(other))
    lost = [s.validation_losses[-1] if s.validation_losses else 0.0 for s in (one, other)]
    quicker, milder = target_share(one) - target_share(other), lost[0] - lost[1]
    if quicker * milder > 0:  # faster and milder, or neither
        return quicker < 0
    near = [corrected_target_share(s) >= MIN_TARGET_SHARE for s in (one, other)]
    return near[0] if near[0] != near[1] else milder < 0
