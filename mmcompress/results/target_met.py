"""Decides whether a target is met: measured latency / target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mmcompress.results.records import Bound, BoundKind, Side, Summary
from mmcompress.spec.schema import Limits, Spec
from mmcompress.spec.target import Goal

MeasureLoad = Callable[[BoundKind, str], float]
"""Returns what there is of the thing that a limit is about, in the limit's unit. It receives the
kind of the bound and its node, which is empty for the whole pipeline."""


def compute_target_share(summary: Summary) -> float:
    """Return measured latency / target."""
    measured_ms: float = getattr(summary.compressed.latency_ms, summary.target.statistic)
    return measured_ms / summary.target.latency_ms


def compute_long_run_target_share(summary: Summary) -> float:
    """Return latency / target as it is in the long run on this machine
    (`Summary.machine_speed_factor`)."""
    return compute_target_share(summary) * summary.machine_speed_factor


def compute_dictated_target_share(summary: Summary) -> float:
    """Return latency / target in the long run, where generators write what the dense ones wrote.

    So a structure is measured before its training: the two can be compared.
    """
    return compute_long_run_target_share(summary) / summary.writing.latency_factor


def compute_corrected_target_share(summary: Summary) -> float:
    """Return latency / target for the decision whether more was cut than needed.

    A pipeline that seems too fast while the machine is faster than usual counts at its long-run
    latency. A miss stays a miss.
    """
    share = compute_target_share(summary)
    if share > 1:
        return share
    return min(max(share, compute_long_run_target_share(summary)), 1.0)


def list_exceeded_bounds(
    spec: Spec, goal: Goal, *, target_ms: float, side: Side
) -> tuple[Bound, ...]:
    """Return every bound of a spec that a measured side exceeds; empty when the target is met.

    Args:
        spec: The spec with its limits.
        goal: The target as it was asked for; it names the statistic of the latency.
        target_ms: Milliseconds that a request may take.
        side: The measured pipeline.
    """
    latency_ms: float = getattr(side.latency_ms, goal.statistic)
    target = Bound(kind=goal.statistic, value=latency_ms, limit=target_ms, unit="ms")
    bounds = [target, *list_limits(spec.limits, side)]
    return tuple(bound for bound in bounds if bound.is_exceeded)


def list_bounds(limits: Limits, measure_load: MeasureLoad) -> list[Bound]:
    """Return every upper limit beside the target, with what there is of it.

    All rooms that look at limits do so by this list.

    Args:
        limits: The limits of a spec; those that are missing are not listed.
        measure_load: Called for every limit that is there, in the order of `Limits`.
    """
    bounds: list[Bound] = []
    if limits.params_m is not None:
        value = measure_load("parameters", "")
        bounds.append(Bound(kind="parameters", value=value, limit=limits.params_m, unit="M"))
    if limits.size_mb is not None:
        value = measure_load("size", "")
        bounds.append(Bound(kind="size", value=value, limit=limits.size_mb, unit="MB"))
    if limits.memory_mb is not None:
        value = measure_load("memory", "")
        bounds.append(Bound(kind="memory", value=value, limit=limits.memory_mb, unit="MB"))
    return [*bounds, *list_node_bounds(limits, measure_load)]


def list_node_bounds(limits: Limits, measure_load: MeasureLoad) -> list[Bound]:
    """Return the limits of single nodes, with what there is of each; see `list_bounds`."""
    bounds: list[Bound] = []
    for node, limit_ms in limits.node_ms.items():
        value = measure_load("p50", node)
        bounds.append(Bound(kind="p50", node=node, value=value, limit=limit_ms, unit="ms"))
    return bounds


def find_worst_ratio(bounds: Sequence[Bound]) -> float:
    """Return the largest ratio of what there is of something to its limit; 0 without a limit."""
    return max((bound.value / bound.limit for bound in bounds), default=0.0)


def list_limits(limits: Limits, side: Side) -> list[Bound]:
    """Return every limit beside the target, with what a measured side has of it.

    A limit of memory is left out where the memory could not be measured.
    """
    if list_undetermined_limits(limits, side):
        limits = replace(limits, memory_mb=None)

    def get_load(kind: BoundKind, node: str) -> float:
        if node:
            return side.nodes[node].latency_ms_p50
        loads = {"parameters": side.params / 1e6, "size": side.size_mb, "memory": side.memory_mb}
        return loads[kind]

    return list_bounds(limits, get_load)


def list_undetermined_limits(limits: Limits, side: Side) -> tuple[BoundKind, ...]:
    """Return the limits that nothing was measured for: memory, where its measurement failed."""
    if limits.memory_mb is not None and not side.memory_mb:
        return ("memory",)
    return ()


def find_worst_limit_ratio(limits: Limits, side: Side) -> float:
    """Return the largest ratio of what a side has to its limit; 0 when there is no limit."""
    return find_worst_ratio(list_limits(limits, side))


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
        for lowest_bound in lowest:
            if lowest_bound.limits_same_thing(bound) and lowest_bound.value > bound.limit:
                return True
    return False


def scale_latencies(lowest: Sequence[Bound], pace: float) -> tuple[Bound, ...]:
    """Return `Target.lowest_reachable` on a machine that is `pace` times slower than when it was
    predicted."""
    scaled_bounds: list[Bound] = []
    for lowest_bound in lowest:
        factor = pace if lowest_bound.is_latency else 1.0
        scaled_bounds.append(replace(lowest_bound, value=lowest_bound.value * factor))
    return tuple(scaled_bounds)


def tighten_limits(current: Limits, requested: Limits, *, side: Side) -> Limits:
    """Return limits to search with after a side exceeded some: lowered by as much as it exceeded
    them.

    Args:
        current: The limits that were searched with.
        requested: The limits of the spec.
        side: The measured pipeline.
    """
    factors: dict[tuple[str, str], float] = {}
    for bound in list_limits(requested, side):
        factors[bound.kind, bound.node] = min(bound.limit / max(bound.value, 1e-12), 1.0)

    def tighten(limit: float | None, kind: str) -> float | None:
        return None if limit is None else limit * factors.get((kind, ""), 1.0)

    node_ms = {}
    for node, limit_ms in current.node_ms.items():
        node_ms[node] = limit_ms * factors.get(("p50", node), 1.0)
    return Limits(
        params_m=tighten(current.params_m, "parameters"),
        size_mb=tighten(current.size_mb, "size"),
        memory_mb=tighten(current.memory_mb, "memory"),
        node_ms=node_ms,
        retained=current.retained,
    )
