"""Every metric before and after, with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping

from mmcompress.report.charts.svg import (
    WIDTH,
    Scale,
    build_svg,
    draw_line,
    draw_rectangle,
    draw_text,
)
from mmcompress.stats import Quality

LEFT = 170.0
"""Units left of the bars, for the names of the metrics."""

RIGHT = WIDTH - 80
"""Units from the left edge to where 100 % lies."""

TOP = 8.0
"""Units above the first bar."""

BAR_HEIGHT = 13.0
"""Units of height of a bar."""

BAR_STEP = 17.0
"""Units from one bar of a metric to the other."""

METRIC_STEP = 46.0
"""Units from one metric to the next."""


def draw_quality_bars(before: Mapping[str, Quality], after: Mapping[str, Quality]) -> str:
    """Draw two bars for each metric.

    Args:
        before: Metrics of the dense pipeline.
        after: The same metrics of the compressed one.
    """
    scale = Scale(low=0.0, high=1.0, start=LEFT, end=RIGHT)
    elements: list[str] = []
    for i, (name, dense_quality) in enumerate(before.items()):
        top = TOP + i * METRIC_STEP
        elements += _draw_bar(dense_quality, scale, top=top, css="dense")
        elements += _draw_bar(after[name], scale, top=top + BAR_STEP, css="compressed")
        label = f"{name} (less is better)" if dense_quality.is_error_rate else name
        elements.append(draw_text(LEFT - 10, top + 20, text=label, anchor="end"))
    height = len(before) * METRIC_STEP + 4
    return build_svg(WIDTH, height, elements=elements, label="quality before and after")


def _draw_bar(quality: Quality, scale: Scale, *, top: float, css: str) -> list[str]:
    """Draw one bar with its interval and its figure."""
    width = scale.place(quality.value) - LEFT
    middle = top + BAR_HEIGHT / 2
    interval_end = scale.place(quality.high)
    return [
        draw_rectangle(LEFT, top, width=width, height=BAR_HEIGHT, css=css),
        draw_line((scale.place(quality.low), middle), (interval_end, middle), css="interval"),
        draw_text(interval_end + 8, top + 11, text=f"{quality.value:.1%}", css="small"),
    ]
