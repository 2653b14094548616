"""Several targets of one pipeline: speedup against the quality that is retained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmcompress.report.charts.svg import (
    CHARACTER_WIDTH,
    PALETTE,
    WIDTH,
    Point,
    Scale,
    build_svg,
    draw_circle,
    draw_line,
    draw_polyline,
    draw_text,
    format_ticks,
)
from mmcompress.report.formats import format_retained
from mmcompress.results.records import Summary

FRONT_HEIGHT = 312.0
"""Units of height."""

FRONT_LEFT = 60.0
"""Units left of the plot."""

FRONT_RIGHT = WIDTH - 16
"""Units from the left edge to the right end of the grid."""

FRONT_TOP = 44.0
"""Units above the plot, for two lines of names of targets."""

FRONT_BOTTOM = FRONT_HEIGHT - 40
"""Units from the upper edge to the lower end of the plot."""

RESULT_ROOM = 110.0
"""Units that the fastest point keeps from the right end of the grid, for its figures."""


def draw_front(summaries: Mapping[str, Summary]) -> str:
    """Draw one point for each target, and a dashed line at each target."""
    runs = sorted(summaries.values(), key=_get_speedup)
    speedup_scale = _fit_speedup_scale(runs)
    quality_scale = _fit_quality_scale(runs)
    points: list[Point] = []
    for run in runs:
        x = speedup_scale.place(run.speedup)
        points.append((x, quality_scale.place(run.quality_retained)))
    dense_point = (speedup_scale.place(1.0), quality_scale.place(1.0))
    elements = _draw_axes(speedup_scale, quality_scale)
    elements += _draw_targets(runs, speedup_scale)
    elements.append(draw_polyline([dense_point, *points], stroke=PALETTE[0]))
    elements += _draw_results(runs, points)
    return build_svg(
        WIDTH, FRONT_HEIGHT, elements=elements, label="quality retained against speedup"
    )


def _get_speedup(run: Summary) -> float:
    """Return the speedup of a run, by which runs are sorted."""
    return run.speedup


def _fit_speedup_scale(runs: Sequence[Summary]) -> Scale:
    """Return the scale that holds the dense pipeline, every result and every target."""
    speedups = [1.0]
    for run in runs:
        speedups += [run.speedup, run.target.speedup]
    return Scale(
        low=min(speedups), high=max(speedups), start=FRONT_LEFT, end=FRONT_RIGHT - RESULT_ROOM
    )


def _fit_quality_scale(runs: Sequence[Summary]) -> Scale:
    """Return the scale that holds every result; it starts at 88 % or below."""
    retained = [run.quality_retained for run in runs]
    lowest = min(0.9, *retained) - 0.02
    highest = max(1.0, *retained) + 0.01
    return Scale(low=lowest, high=highest, start=FRONT_BOTTOM, end=FRONT_TOP)


def _draw_axes(speedup_scale: Scale, quality_scale: Scale) -> list[str]:
    """Draw the grid, the ticks and the names of both axes."""
    elements: list[str] = []
    shares = quality_scale.list_ticks()
    for share, text in zip(shares, format_ticks(shares, is_share=True), strict=True):
        y = quality_scale.place(share)
        elements.append(draw_line((FRONT_LEFT, y), (FRONT_RIGHT, y), css="grid"))
        elements.append(draw_text(FRONT_LEFT - 8, y + 4, text=text, css="small", anchor="end"))
    speedups = speedup_scale.list_ticks()
    for speedup, text in zip(speedups, format_ticks(speedups), strict=True):
        x = speedup_scale.place(speedup)
        elements.append(
            draw_text(x, FRONT_BOTTOM + 18, text=f"{text}×", css="small", anchor="middle")
        )
    middle = (FRONT_LEFT + FRONT_RIGHT) / 2
    elements.append(
        draw_text(middle, FRONT_HEIGHT - 4, text="speedup", css="small", anchor="middle")
    )
    return elements


def _draw_results(runs: Sequence[Summary], points: Sequence[Point]) -> list[str]:
    """Draw a circle with its figures for each result, from the slowest to the fastest."""
    elements: list[str] = []
    last_end = 0.0
    is_below = False
    for run, (x, y) in zip(runs, points, strict=True):
        figures = f"{run.speedup:.2f}×, {format_retained(run.determined_quality)}"
        # Figures stand above their point, or below it where the ones before are in the way.
        is_below = x < last_end and not is_below
        last_end = x + 8 + CHARACTER_WIDTH * len(figures)
        text_y = y + 20 if is_below else y - 8
        elements.append(draw_circle(x, y, radius=5, fill=PALETTE[0]))
        elements.append(draw_text(x + 8, text_y, text=figures, css="halo"))
    return elements


def _draw_targets(runs: Sequence[Summary], speedup_scale: Scale) -> list[str]:
    """Draw a dashed line at each target, with its name above; names that are near use two lines."""
    elements: list[str] = []
    targets = sorted((run.target.speedup, run.target.text) for run in runs)
    last_end = 0.0
    is_raised = False
    for speedup, target_text in targets:
        x = speedup_scale.place(speedup)
        half_width = CHARACTER_WIDTH * len(target_text) / 2
        is_raised = x - half_width < last_end and not is_raised
        last_end = x + half_width
        text_y = FRONT_TOP - 26 if is_raised else FRONT_TOP - 10
        elements.append(draw_line((x, text_y + 4), (x, FRONT_BOTTOM), css="target"))
        elements.append(draw_text(x, text_y, text=target_text, css="small halo", anchor="middle"))
    return elements
