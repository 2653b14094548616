"""Every metric before and after, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping

import altair

from mmcompress.report.charts.vega import (
    LINE_COLOR,
    Row,
    choose_color,
    fit_page_width,
    layer_charts,
    make_chart,
    make_label_axis,
    render_chart,
)
from mmcompress.report.formats import format_percent
from mmcompress.stats import Quality

METRIC_HEIGHT = 46
"""Pixels of height of a metric."""

QUALITY_FRAME_HEIGHT = 70
"""Pixels of height of legend and axis."""

FIGURE_ROOM = 1.12
"""End of the axis / highest figure: the figure stands right of its bar."""


def draw_quality_bars(before: Mapping[str, Quality], after: Mapping[str, Quality]) -> str:
    """Draw two bars for each metric.

    Args:
        before: Metrics of the dense pipeline.
        after: The same metrics of the compressed one.
    """
    rows: list[Row] = []
    names: list[str] = []
    for metric, quality in before.items():
        name = f"{metric} (less is better)" if quality.is_error_rate else metric
        names.append(name)
        rows.append(_make_row(name, "before", quality=quality))
        rows.append(_make_row(name, "after", quality=after[metric]))
    # An error rate may be above 100 %.
    highest = max([1.0, *(float(row["high"]) for row in rows)])
    chart = make_chart(rows)
    y = altair.Y("metric:N", sort=None, title=None, axis=make_label_axis(names))
    offset = altair.YOffset("side:N", sort=None)
    x = altair.X(
        "value:Q",
        title=None,
        axis=altair.Axis(format=".0%", values=_list_ticks(highest)),
        scale=altair.Scale(domain=[0, FIGURE_ROOM * highest], nice=False),
    )
    color = altair.Color(
        "side:N",
        sort=None,
        scale=altair.Scale(domain=["before", "after"], range=[LINE_COLOR, choose_color(0)]),
    )
    bars = chart.mark_bar().encode(
        x=x, y=y, yOffset=offset, color=color, description="description:N"
    )
    intervals = chart.mark_rule(aria=False).encode(x="low:Q", x2="high:Q", y=y, yOffset=offset)
    figures = chart.mark_text(align="left", dx=8, fontSize=11, aria=False).encode(
        x="high:Q", y=y, yOffset=offset, text="figure:N"
    )
    height = QUALITY_FRAME_HEIGHT + METRIC_HEIGHT * max(1, len(before))
    layers = [bars, intervals, figures]
    layered = fit_page_width(layer_charts(*layers), height=height)
    return render_chart(layered, label="quality before and after")


def _list_ticks(highest: float) -> list[float]:
    """List ten places of the axis or fewer, none beyond the highest figure."""
    step = 0.1 * math.ceil(highest)
    return [step * number for number in range(math.floor(highest / step + 1e-9) + 1)]


def _make_row(metric: str, side: str, *, quality: Quality) -> Row:
    """Return the row of one bar."""
    figure = format_percent(quality.value)
    interval = f"{format_percent(quality.low)} to {format_percent(quality.high)}"
    return {
        "metric": metric,
        "side": side,
        "value": quality.value,
        "low": quality.low,
        "high": quality.high,
        "figure": figure,
        "description": f"{metric}, {side}: {figure} ({interval})",
    }
