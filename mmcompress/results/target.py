"""Decides whether a target is met: what a measured pipeline takes, over what it may take."""

from __future__ import annotations

from collections.abc import Mapping

from mmcompress.results.records import Side, Summary
from mmcompress.spec.schema import Limits, Spec
from mmcompress.spec.target import Goal

Bound = tuple[str, float, float, str]
"""(what is bound, what a side has of it, the limit, unit)."""


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

    A pipeline that only seems too fast while the machine is in a mood counts at its long-run
    latency. A miss stays a miss.
    """
    share = target_share(summary)
    if share > 1:
        return share
    return min(max(share, long_run_target_share(summary)), 1.0)


def list_exceeded_bounds(
    spec: Spec, goal: Goal, *, target_ms: float, side: Side
) -> tuple[str, ...]:
    """Return every bound of a spec that a measured side exceeds, in words; empty when the target is
    met."""
    latency_ms: float = getattr(side.latency_ms, goal.statistic)
    bounds: list[Bound] = [(f"{goal.statistic} end to end", latency_ms, target_ms, "ms")]
    bounds += _list_limits(spec.limits, side)
    exceeded: list[str] = []
    for what, value, limit, unit in bounds:
        if value > limit:
            exceeded.append(f"{what}: {value:.2f} {unit}, asked for {limit:.2f}")
    return tuple(exceeded)


def _list_limits(limits: Limits, side: Side) -> list[Bound]:
    """Return every limit beside the target, with what a side has of it."""
    bounds: list[Bound] = []
    for node, limit_ms in limits.node_ms.items():
        bounds.append((f"p50 of '{node}'", side.nodes[node].latency_ms_p50, limit_ms, "ms"))
    if limits.params_m is not None:
        bounds.append(("parameters", side.params / 1e6, limits.params_m, "M"))
    if limits.size_mb is not None:
        bounds.append(("size", side.size_mb, limits.size_mb, "MB"))
    if limits.memory_mb is not None:
        bounds.append(("memory", side.memory_mb, limits.memory_mb, "MB"))
    return bounds


def worst_limit_ratio(limits: Limits, side: Side) -> float:
    """Return the largest ratio of what a side has to its limit; 0 when there is no limit."""
    ratios = [value / limit for _, value, limit, _ in _list_limits(limits, side)]
    return max(ratios, default=0.0)


def is_out_of_reach(limits: Limits, side: Side, *, lowest: Mapping[str, float]) -> bool:
    """Return whether a limit lies below the least that is predicted of anything in the search
    space.

    Args:
        limits: The limits of the spec.
        side: The measured pipeline.
        lowest: `Target.lowest_reachable`.
    """
    for what, value, limit, _ in _list_limits(limits, side):
        if value > limit and lowest.get(what, 0.0) > limit:
            return True
    return False


def scale_latencies(lowest: Mapping[str, float], pace: float) -> dict[str, float]:
    """Return `Target.lowest_reachable` on a machine that is `pace` times slower than when it was
    predicted."""
    scaled: dict[str, float] = {}
    for what, least in lowest.items():
        scaled[what] = least * pace if what.startswith("p50 ") else least
    return scaled


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
