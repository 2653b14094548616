"""Predicted against measured milliseconds, on one scale.

The chart can stand in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair

from mmcompress.report.charts.vega import (
    SOFT_INK,
    TARGET_DASH,
    Row,
    choose_color,
    layer_charts,
    make_chart,
    render_chart,
)

PLOT_SIZE = 380
"""Pixels of width and of height of the plot."""


def draw_prediction(predicted_ms: Sequence[float], measured_ms: Sequence[float]) -> str:
    """Draw a point for each structure, and the line on which both are equal.

    Args:
        predicted_ms: Milliseconds of each structure; at least one.
        measured_ms: Milliseconds of the same structures.
    """
    low = 0.95 * min(*predicted_ms, *measured_ms)
    high = 1.05 * max(*predicted_ms, *measured_ms) or 1.0
    scale = altair.Scale(domain=[low, high], nice=False, zero=False)
    x = altair.X("predicted:Q", title="predicted, ms", scale=scale)
    y = altair.Y("measured:Q", title="measured, ms", scale=scale)
    rows: list[Row] = [
        {
            "predicted": predicted,
            "measured": measured,
            "description": f"predicted {predicted:.2f} ms, measured {measured:.2f} ms",
        }
        for predicted, measured in zip(predicted_ms, measured_ms, strict=True)
    ]
    ends = make_chart([{"predicted": end, "measured": end} for end in (low, high)])
    layers = layer_charts(
        ends.mark_line(color=SOFT_INK, strokeDash=TARGET_DASH, strokeWidth=1, aria=False).encode(
            x=x, y=y
        ),
        make_chart(rows)
        .mark_circle(size=60, color=choose_color(0), opacity=0.8)
        .encode(x=x, y=y, description="description:N"),
    )
    chart = layers.properties(width=PLOT_SIZE, height=PLOT_SIZE)
    return render_chart(chart, label="predicted against measured latency")
