"""What a measured pipeline takes of what it may take: of its target, and of the limits beside that."""

from __future__ import annotations

from collections.abc import Mapping

from mmcompress.results.records import Side, Summary
from mmcompress.spec.schema import Limits, Spec
from mmcompress.spec.target import Goal


def target_share(s: Summary) -> float:
    """What a pipeline took of what it may take."""
    return float(getattr(s.compressed.latency_ms, s.target.statistic)) / s.target.latency_ms


def long_run_target_share(s: Summary) -> float:
    """`of_target` as it is usually on this machine: see `Summary.usual`."""
    return target_share(s) * s.machine_speed_factor


def corrected_target_share(s: Summary) -> float:
    """`of_target`, a result that only seems too fast while the machine is in a mood taken at what it takes usually; a
    miss stays one."""
    reached = target_share(s)
    return reached if reached > 1 else min(max(reached, long_run_target_share(s)), 1.0)


def list_exceeded_bounds(spec: Spec, goal: Goal, *, target_ms: float, s: Side) -> tuple[str, ...]:
    """Every bound of a spec that a measured side exceeds, in words."""
    whole = (f"{goal.statistic} end to end", getattr(s.latency_ms, goal.statistic), target_ms, "ms")
    return tuple(
        f"{what}: {have:.2f} {unit}, asked for {bound:.2f}"
        for what, have, bound, unit in (whole, *_bounds(spec.limits, s))
        if have > bound
    )


def _bounds(limits: Limits, s: Side) -> list[tuple[str, float, float, str]]:
    """(what, what a side has of it, its bound, unit) of every limit."""
    nodes = [
        (f"p50 of '{n}'", s.nodes[n].latency_ms_p50, ms, "ms") for n, ms in limits.node_ms.items()
    ]
    sizes = (
        ("parameters", s.params / 1e6, limits.params_m, "M"),
        ("size", s.size_mb, limits.size_mb, "MB"),
        ("memory", s.memory_mb, limits.memory_mb, "MB"),
    )
    return nodes + [
        (what, have, bound, unit) for what, have, bound, unit in sizes if bound is not None
    ]


def worst_limit_ratio(limits: Limits, s: Side) -> float:
    """The most that a side takes of a limit; 0 where there is none."""
    return max((have / bound for _, have, bound, _ in _bounds(limits, s)), default=0.0)


def is_out_of_reach(limits: Limits, s: Side, *, lowest: Mapping[str, float]) -> bool:
    """Whether a limit lies below the least that is predicted of anything in the search space (`Target.lowest`)."""
    return any(
        have > bound and lowest.get(what, 0.0) > bound
        for what, have, bound, _ in _bounds(limits, s)
    )


def scale_latencies(lowest: Mapping[str, float], pace: float) -> dict[str, float]:
    """The same (`Target.lowest`) where everything takes so many times as long as it was predicted to."""
    return {
        what: least * pace if what.startswith("p50 ") else least for what, least in lowest.items()
    }


def tighten_limits(now: Limits, asked: Limits, *, s: Side) -> Limits:
    """Limits to search with after a side exceeded some of those that were asked for: lowered by as much."""

    def less(at: float | None, bound: float | None, have: float) -> float | None:
        return at if at is None or bound is None or have <= bound else at * bound / have

    node_ms = {
        n: less(now.node_ms[n], ms, s.nodes[n].latency_ms_p50) for n, ms in asked.node_ms.items()
    }
    return Limits(
        params_m=less(now.params_m, asked.params_m, s.params / 1e6),
        size_mb=less(now.size_mb, asked.size_mb, s.size_mb),
        memory_mb=less(now.memory_mb, asked.memory_mb, s.memory_mb),
        node_ms=node_ms,  # type: ignore[arg-type]
    )
