"""Decides whether a target is met: measured latency / target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmcompress.results.records import Bound, Side, Summary
from mmcompress.spec.schema import Limits, Spec
from mmcompress.spec.target import Goal


def target_share(summary: Summary) -> float:
    """Return measured latency / target."""
    measured_ms: float = getattr(summary.compressed.latency_ms, summary.target.statistic)
    return measured_ms / summary.target.latency_ms


def long_run_target_share(summary: Summary) -> float:
    """Return latency / target as it is in the long run on this machine
    (`Summary.machine_speed_factor`)."""
    return target_share(summary) * summary.machine_speed_factor


def corrected_target_share(summary: Summary) -> float:
    """Return latency / target for the decision whether more was cut than needed.

    A pipeline that seems too fast while the machine is faster than usual counts at its long-run
    latency. A miss stays a miss.
    """
    share = target_share(summary)
    if share > 1:
        return share
    return min(max(share, long_run_target_share(summary)), 1.0)


def list_exceeded_bounds(
    spec: Spec, goal: Goal, *, target_ms: float, side: Side
) -> tuple[Bound, ...]:
    """Return every bound of a spec that a measured side exceeds; empty when the target is met."""
    latency_ms: float = getattr(side.latency_ms, goal.statistic)
    target = Bound(kind=goal.statistic, value=latency_ms, limit=target_ms, unit="ms")
    bounds = [target, *list_limits(spec.limits, side)]
    return tuple(bound for bound in bounds if bound.is_exceeded)


def list_limits(limits: Limits, side: Side) -> list[Bound]:
    """Return every limit beside the target, with what a side has of it."""
    bounds: list[Bound] = []
    for node, limit_ms in limits.node_ms.items():
        node_ms = side.nodes[node].latency_ms_p50
        bounds.append(Bound(kind="p50", node=node, value=node_ms, limit=limit_ms, unit="ms"))
    if limits.params_m is not None:
        params_m = side.params / 1e6
        bounds.append(Bound(kind="parameters", value=params_m, limit=limits.params_m, unit="M"))
    if limits.size_mb is not None:
        bounds.append(Bound(kind="size", value=side.size_mb, limit=limits.size_mb, unit="MB"))
    if limits.memory_mb is not None:
        bounds.append(Bound(kind="memory", value=side.memory_mb, limit=limits.memory_mb, unit="MB"))
    return bounds


def worst_limit_ratio(limits: Limits, side: Side) -> float:
    """Return the largest ratio of what a side has to its limit; 0 when there is no limit."""
    ratios = [bound.value / bound.limit for bound in list_limits(limits, side)]
    return max(ratios, default=0.0)


def is_out_of_reach(limits: Limits, side: Side, *, lowest: Sequence[Bound]) -> bool:
    """Return whether a limit lies below the least that is predicted of anything in the search
    space.

    Args:
        limits: The limits of the spec.
        side: The measured pipeline.
        lowest: `Target.lowest_reachable`.
    """
    for bound in list_limits(limits, side):
        if not bound.is_exceeded:
            continue
        for least in lowest:
            if least.limits_same_thing(bound) and least.value > bound.limit:
                return True
    return False


def scale_latencies(lowest: Sequence[Bound], pace: float) -> tuple[Bound, ...]:
    """Return `Target.lowest_reachable` on a machine that is `pace` times slower than when it was
    predicted."""
    scaled: list[Bound] = []
    for least in lowest:
        factor = pace if least.is_latency else 1.0
        scaled.append(replace(least, value=least.value * factor))
    return tuple(scaled)


def tighten_limits(current: Limits, asked: Limits, *, side: Side) -> Limits:
    """Return limits to search with after a side exceeded some: lowered by as much as it exceeded
    them.

    Args:
        current: The limits that were searched with.
        asked: The limits of the spec.
        side: The measured pipeline.
    """
    node_ms: dict[str, float] = {}
    for node, limit_ms in asked.node_ms.items():
        factor = _tightening_factor(limit_ms, side.nodes[node].latency_ms_p50)
        node_ms[node] = current.node_ms[node] * factor
    return Limits(
        params_m=_tighten(current.params_m, asked.params_m, value=side.params / 1e6),
        size_mb=_tighten(current.size_mb, asked.size_mb, value=side.size_mb),
        memory_mb=_tighten(current.memory_mb, asked.memory_mb, value=side.memory_mb),
        node_ms=node_ms,
    )


def _tighten(current: float | None, asked: float | None, *, value: float) -> float | None:
    """Return one limit, lowered when it was exceeded; None stays None."""
    if current is None or asked is None:
        return current
    return current * _tightening_factor(asked, value)


def _tightening_factor(asked: float, value: float) -> float:
    """Return limit / value when the limit was exceeded, else 1."""
    return asked / value if value > asked else 1.0
