"""Several targets of one pipeline: speedup against the quality that is retained."""

from __future__ import annotations

from collections.abc import Mapping

from mmcompress.report.charts.svg import (
    PALETTE,
    WIDTH,
    Scale,
    build_svg,
    draw_circle,
    draw_line,
    draw_polyline,
    draw_text,
)
from mmcompress.results.records import Summary

HEIGHT = 260.0
"""Units of height."""

LEFT = 60.0
"""Units left of the plot."""

RIGHT = WIDTH - 16
"""Units from the left edge to the right end of the grid."""

TOP = 12.0
"""Units above the plot."""

BOTTOM = HEIGHT - 40
"""Units from the upper edge to the lower end of the plot."""

LABEL_ROOM = 24.0
"""Units that the fastest point keeps from the right end of the grid."""


def draw_front(summaries: Mapping[str, Summary]) -> str:
    """Draw one point for each target, and a dashed line at each target."""
    runs = list(summaries.values())
    speedup_scale = _fit_speedup_scale(runs)
    quality_scale = _fit_quality_scale(runs)
    elements: list[str] = []
    for retained in _list_quality_ticks(quality_scale):
        y = quality_scale.place(retained)
        elements.append(draw_line((LEFT, y), (RIGHT, y), css="grid"))
        elements.append(
            draw_text(LEFT - 8, y + 4, text=f"{retained:.0%}", css="small", anchor="end")
        )
    elements.append(_draw_path(runs, speedup_scale, quality_scale=quality_scale))
    for run in runs:
        target_x = speedup_scale.place(run.target.speedup)
        elements.append(draw_line((target_x, 8), (target_x, BOTTOM), css="target"))
        elements.append(
            draw_text(target_x, HEIGHT - 20, text=run.target.asked, css="small", anchor="middle")
        )
        x = speedup_scale.place(run.speedup)
        y = quality_scale.place(run.quality_retained)
        elements.append(draw_circle(x, y, radius=5, fill=PALETTE[0]))
        figures = f"{run.speedup:.2f}×, {run.quality_retained:.1%}"
        elements.append(draw_text(x + 8, y - 8, text=figures))
    middle = (LEFT + WIDTH) / 2
    elements.append(draw_text(middle, HEIGHT - 4, text="speed-up", css="small", anchor="middle"))
    return build_svg(WIDTH, HEIGHT, elements=elements, label="quality kept against speed-up")


def _fit_speedup_scale(runs: list[Summary]) -> Scale:
    """Return the scale that holds the dense pipeline, every result and every target."""
    speedups = [run.speedup for run in runs] + [run.target.speedup for run in runs]
    return Scale(low=1.0, high=max(speedups) * 1.08, start=LEFT, end=RIGHT - LABEL_ROOM)


def _fit_quality_scale(runs: list[Summary]) -> Scale:
    """Return the scale that holds every result; it starts at 88 % or below."""
    lowest = min(0.9, *(run.quality_retained for run in runs)) - 0.02
    return Scale(low=lowest, high=1.01, start=BOTTOM, end=TOP)


def _list_quality_ticks(scale: Scale) -> list[float]:
    """Return five values up to 100 %."""
    step = (1 - scale.low) / 4
    return [scale.low + step * i for i in range(5)]


def _draw_path(runs: list[Summary], speedup_scale: Scale, *, quality_scale: Scale) -> str:
    """Draw the line from the dense pipeline through every result."""
    results = sorted((run.speedup, run.quality_retained) for run in runs)
    points: list[tuple[float, float]] = []
    for speedup, retained in [(1.0, 1.0), *results]:
        points.append((speedup_scale.place(speedup), quality_scale.place(retained)))
    return draw_polyline(points, stroke=PALETTE[0])
