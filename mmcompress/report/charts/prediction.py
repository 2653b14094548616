"""Predicted against measured milliseconds, on one scale.

The chart can stand in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmcompress.report.charts.svg import (
    PALETTE,
    Scale,
    build_svg,
    draw_circle,
    draw_line,
    draw_text,
    format_ticks,
)

SIZE = 420.0
"""Units of width and of height."""

PREDICTION_LEFT = 54.0
"""Units left of the plot."""

PREDICTION_RIGHT = SIZE - 16
"""Units from the left edge to the right end of the plot."""

PREDICTION_BOTTOM = SIZE - 46
"""Units from the upper edge to the lower end of the plot."""

PREDICTION_TOP = PREDICTION_BOTTOM - (PREDICTION_RIGHT - PREDICTION_LEFT)
"""Units above the plot, which is a square."""

ROOT_ATTRIBUTES = {
    "style": "max-width: 420px; min-width: 300px",
    "xmlns": "http://www.w3.org/2000/svg",
    "font-family": "system-ui, sans-serif",
    "font-size": "12",
}
"""What a file of its own needs where no style sheet is."""


def draw_prediction(predicted_ms: Sequence[float], measured_ms: Sequence[float]) -> str:
    """Draw a point for each structure, and the line on which both are equal.

    Args:
        predicted_ms: Milliseconds of each structure; at least one.
        measured_ms: Milliseconds of the same structures.
    """
    low = 0.95 * min(*predicted_ms, *measured_ms)
    high = 1.05 * max(*predicted_ms, *measured_ms)
    x_scale = Scale(low=low, high=high, start=PREDICTION_LEFT, end=PREDICTION_RIGHT)
    y_scale = Scale(low=low, high=high, start=PREDICTION_BOTTOM, end=PREDICTION_TOP)
    elements: list[str] = []
    ticks = x_scale.list_ticks()
    for milliseconds, text in zip(ticks, format_ticks(ticks), strict=True):
        x = x_scale.place(milliseconds)
        y = y_scale.place(milliseconds)
        elements.append(
            draw_line((x, PREDICTION_TOP), (x, PREDICTION_BOTTOM), stroke="#999", opacity=".3")
        )
        elements.append(
            draw_line((PREDICTION_LEFT, y), (PREDICTION_RIGHT, y), stroke="#999", opacity=".3")
        )
        elements.append(draw_text(x, PREDICTION_BOTTOM + 18, text=text, anchor="middle"))
        elements.append(draw_text(PREDICTION_LEFT - 8, y + 4, text=text, anchor="end"))
    elements.append(
        draw_line(
            (PREDICTION_LEFT, PREDICTION_BOTTOM),
            (PREDICTION_RIGHT, PREDICTION_TOP),
            stroke="#999",
            dash="5 4",
        )
    )
    for predicted, measured in zip(predicted_ms, measured_ms, strict=True):
        x = x_scale.place(predicted)
        y = y_scale.place(measured)
        elements.append(draw_circle(x, y, radius=4, fill=PALETTE[0], opacity=".8"))
    elements.append(
        draw_text(
            (PREDICTION_LEFT + PREDICTION_RIGHT) / 2,
            SIZE - 6,
            text="predicted, ms",
            anchor="middle",
        )
    )
    elements.append(draw_text(6, 14, text="measured, ms"))
    return build_svg(
        SIZE,
        SIZE,
        elements=elements,
        label="predicted against measured latency",
        attributes=ROOT_ATTRIBUTES,
    )
