"""The fronts of several runs over each other: what their searches reached at every latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mmcompress.report.charts.svg import (
    WIDTH,
    LegendEntry,
    Point,
    Scale,
    build_svg,
    choose_color,
    draw_circle,
    draw_legend,
    draw_line,
    draw_polyline,
    draw_text,
    format_ticks,
    shorten_text,
)
from mmcompress.results.records import Summary

FRONTS_HEIGHT = 330.0
"""Units of height."""

FRONTS_LEFT = 60.0
"""Units left of the plot."""

FRONTS_RIGHT = WIDTH - 16
"""Units from the left edge to the right end of the plot."""

FRONTS_TOP = 56.0
"""Units above the plot, for the legend."""

FRONTS_BOTTOM = FRONTS_HEIGHT - 40
"""Units from the upper edge to the lower end of the plot."""

LEGEND_LABEL_WIDTH = 120.0
"""Units of width of the name of a run."""


def list_front(summary: Summary) -> list[Point]:
    """List the trials that no other one beats: (latency / dense latency, loss), fastest first."""
    dense_ms = summary.baseline.latency_ms.p50
    points = sorted(
        (trial.latency_ms / dense_ms, trial.loss)
        for trial in summary.trials
        if math.isfinite(trial.loss)
    )
    front: list[Point] = []
    for share, loss in points:
        if not front or loss < front[-1][1]:
            front.append((share, loss))
    return front


def draw_run_fronts(runs: Mapping[str, Summary]) -> str:
    """Draw a line for each run; nothing where no run has trials.

    Args:
        runs: The summaries by name.
    """
    fronts = {name: list_front(summary) for name, summary in runs.items()}
    points = [point for front in fronts.values() for point in front]
    if not points:
        return ""
    shares = [share for share, _ in points]
    losses = [loss for _, loss in points]
    share_scale = Scale(
        low=min(shares) * 0.98, high=max(shares) * 1.02, start=FRONTS_LEFT, end=FRONTS_RIGHT
    )
    loss_scale = Scale(
        low=min(losses) * 0.95, high=max(losses) * 1.05, start=FRONTS_BOTTOM, end=FRONTS_TOP
    )
    elements = _draw_axes(share_scale, loss_scale)
    entries: list[LegendEntry] = []
    for i, (name, front) in enumerate(fronts.items()):
        color = choose_color(i)
        entries.append(LegendEntry(label=shorten_text(name, LEGEND_LABEL_WIDTH), fill=color))
        elements += _draw_one_front(front, share_scale, loss_scale=loss_scale, color=color)
    elements += draw_legend(FRONTS_LEFT, 12, entries=entries)
    return build_svg(WIDTH, FRONTS_HEIGHT, elements=elements, label="fronts of the runs")


def _draw_one_front(
    front: Sequence[Point], share_scale: Scale, *, loss_scale: Scale, color: str
) -> list[str]:
    """Draw the line of a run and a circle at each of its trials."""
    places = [(share_scale.place(share), loss_scale.place(loss)) for share, loss in front]
    elements = [draw_polyline(places, stroke=color)] if len(places) > 1 else []
    for (x, y), (share, loss) in zip(places, front, strict=True):
        title = f"{share:.1%} of the dense latency, loss {loss:.3f}"
        elements.append(draw_circle(x, y, radius=4, fill=color, title=title))
    return elements


def _draw_axes(share_scale: Scale, loss_scale: Scale) -> list[str]:
    """Draw the grid, the ticks and the names of both axes."""
    elements: list[str] = []
    losses = loss_scale.list_ticks()
    for loss, text in zip(losses, format_ticks(losses), strict=True):
        y = loss_scale.place(loss)
        elements.append(draw_line((FRONTS_LEFT, y), (FRONTS_RIGHT, y), css="grid"))
        elements.append(draw_text(FRONTS_LEFT - 8, y + 4, text=text, css="small", anchor="end"))
    shares = share_scale.list_ticks()
    for share, text in zip(shares, format_ticks(shares, is_share=True), strict=True):
        x = share_scale.place(share)
        elements.append(draw_text(x, FRONTS_BOTTOM + 18, text=text, css="small", anchor="middle"))
    middle = (FRONTS_LEFT + FRONTS_RIGHT) / 2
    elements.append(
        draw_text(
            middle,
            FRONTS_HEIGHT - 4,
            text="predicted latency / dense latency",
            css="small",
            anchor="middle",
        )
    )
    elements.append(
        draw_text(FRONTS_LEFT - 8, FRONTS_TOP - 8, text="loss", css="small", anchor="end")
    )
    return elements
