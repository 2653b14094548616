"""Which slower target a run goes on with, after too little of the dense quality was kept. No torch.

A speed-up s is lowered by a third of its gain over 1x:

    slower = 1 + (s - 1) * 2 / 3        4x > 3x > 2.33x,  2x > 1.67x > 1.44x

A target in milliseconds is raised to the latency of that speed-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mmcompress.results.records import SlowerTarget, Summary
from mmcompress.spec.target import parse_target
from mmcompress.stats import Latency
from mmcompress.workspace.folder import name_target_folder

MAX_SLOWER_TARGETS = 2
"""Further targets that a run makes at most for one that was asked for: each costs a search and a
training."""

LOWERED_GAIN_SHARE = 1 / 3
"""Share of the gain over 1x that a slower target gives up. Two of them leave four ninths of it."""

SIGNIFICANT_DIGITS = 3
"""Digits of a slower target: it names a folder, and no latency is more certain."""


def find_slower_target(tried: Sequence[Summary], *, dense: Latency) -> str | None:
    """Return the target that a run goes on with; None where it ends.

    It ends when enough is kept, when that could not be judged, after `MAX_SLOWER_TARGETS`, and
    where no slower target has a gain left.

    Args:
        tried: The results so far: of the target that was asked for, then of slower ones.
        dense: Latency of the dense pipeline as it was profiled.
    """
    retained = tried[-1].retained
    if retained is None or retained.is_kept or len(tried) > MAX_SLOWER_TARGETS:
        return None
    return slow_down_target(tried[-1].target.text, dense=dense)


def slow_down_target(target: str, *, dense: Latency) -> str | None:
    """Return the next slower target; None where the target asks for hardly any gain.

    Args:
        target: `3x`, `12ms` or `12ms p95`.
        dense: Latency of the dense pipeline; a target in milliseconds has its gain over that.
    """
    goal = parse_target(target)
    dense_ms: float = getattr(dense, goal.statistic)
    speedup = goal.value if goal.kind == "speedup" else dense_ms / goal.value
    slower_speedup = 1 + (speedup - 1) * (1 - LOWERED_GAIN_SHARE)
    unit = "x" if goal.kind == "speedup" else "ms"
    value = slower_speedup if goal.kind == "speedup" else dense_ms / slower_speedup
    rounded = _write_number(value)
    is_slower = float(rounded) < goal.value if unit == "x" else float(rounded) > goal.value
    if speedup <= 1 or not is_slower or (unit == "x" and float(rounded) <= 1):
        return None
    ending = " p95" if goal.statistic == "p95" else ""
    return f"{rounded}{unit}{ending}"


def add_slower_targets(summary: Summary, slower: Sequence[Summary]) -> Summary:
    """Return the summary of a target with what its report tells of the slower ones.

    Args:
        summary: The result for the target that was asked for.
        slower: The results for slower targets; one that could not be judged is left out.
    """
    if summary.retained is None:
        return summary
    rows = []
    for result in slower:
        if result.retained is not None:
            row = SlowerTarget(
                target=result.target.text,
                folder=name_target_folder(result.target.text),
                speedup=result.speedup,
                met=result.target.met,
                choosing=result.retained.choosing,
            )
            rows.append(row)
    return replace(summary, retained=replace(summary.retained, slower=tuple(rows)))


def _write_number(value: float) -> str:
    """Return a number with a few digits, without an exponent and without zeros at its end."""
    decimals = max(SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(value)), 0)
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
