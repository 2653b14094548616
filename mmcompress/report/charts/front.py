"""Several targets of one pipeline: speedup against the quality that is retained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair

from mmcompress.report.charts.vega import (
    Row,
    choose_color,
    draw_target_line,
    fit_page_width,
    layer_charts,
    make_chart,
    render_chart,
)
from mmcompress.report.formats import format_retained
from mmcompress.results.records import Summary

FRONT_HEIGHT = 330
"""Pixels of height."""

RESULT_ROOM = 0.16
"""Room right of the fastest result for its figures, as a share of the speedups that are shown."""

MIN_TARGET_DISTANCE = 0.1
"""Share of the speedups shown below which the names of two targets stand on two lines."""


def draw_front(summaries: Mapping[str, Summary]) -> str:
    """Draw one point for each target, and a dashed line at each target."""
    runs = sorted(summaries.values(), key=_get_speedup)
    speedups = [1.0]
    for run in runs:
        speedups += [run.speedup, run.target.speedup]
    span = max(speedups) - min(speedups) or 1.0
    retained = [run.quality_retained for run in runs]
    x = altair.X(
        "speedup:Q",
        title="speedup",
        axis=altair.Axis(labelExpr="datum.label + '×'"),
        scale=altair.Scale(
            domain=[min(speedups) - 0.03 * span, max(speedups) + RESULT_ROOM * span],
            nice=False,
            zero=False,
        ),
    )
    y = altair.Y(
        "retained:Q",
        title="quality retained",
        axis=altair.Axis(format=".0%"),
        scale=altair.Scale(
            domain=[min(0.9, *retained) - 0.02, max(1.0, *retained) + 0.03], nice=False, zero=False
        ),
    )
    results = [_make_row(run) for run in runs]
    line = make_chart([{"speedup": 1.0, "retained": 1.0}, *results])
    points = make_chart(results)
    layers = [
        *_draw_targets(runs, span),
        line.mark_line(color=choose_color(0), strokeWidth=1.5, aria=False).encode(x=x, y=y),
        points.mark_circle(size=90, color=choose_color(0), opacity=1).encode(
            x=x, y=y, description="figures:N"
        ),
        points.mark_text(align="left", dx=8, dy=-8, aria=False).encode(x=x, y=y, text="figures:N"),
    ]
    chart = fit_page_width(layer_charts(*layers), height=FRONT_HEIGHT)
    return render_chart(chart, label="quality retained against speedup")


def _get_speedup(run: Summary) -> float:
    """Return the speedup of a run, by which runs are sorted."""
    return run.speedup


def _make_row(run: Summary) -> Row:
    """Return the row of one result."""
    return {
        "speedup": run.speedup,
        "retained": run.quality_retained,
        "figures": f"{run.speedup:.2f}×, {format_retained(run.determined_quality)}",
    }


def _draw_targets(runs: Sequence[Summary], span: float) -> list[altair.Chart]:
    """Draw a dashed line at each target, with its name above; names that are near use two lines."""
    layers: list[altair.Chart] = []
    targets = sorted((run.target.speedup, run.target.text) for run in runs)
    last_low: float | None = None
    for speedup, name in targets:
        is_near = last_low is not None and speedup - last_low < MIN_TARGET_DISTANCE * span
        line, text = draw_target_line(speedup, text=name)
        if is_near:
            text = text.encode(y=altair.value(-18))
            last_low = None
        else:
            last_low = speedup
        layers += [line, text]
    return layers
