"""Every metric before and after, with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping

from mmcompress.report.charts.svg import (
    CHARACTER_WIDTH,
    WIDTH,
    LegendEntry,
    Scale,
    build_svg,
    draw_legend,
    draw_line,
    draw_rectangle,
    draw_text,
)
from mmcompress.report.formats import format_percent
from mmcompress.stats import Quality

QUALITY_BARS_MIN_LEFT = 130.0
"""Units left of the bars at least, for the names of the metrics."""

QUALITY_BARS_RIGHT = WIDTH - 80
"""Units from the left edge to where 100 % lies, or the highest figure above it."""

QUALITY_BARS_TOP = 28.0
"""Units above the first bar, for the legend."""

QUALITY_BAR_HEIGHT = 13.0
"""Units of height of a bar."""

QUALITY_BAR_STEP = 17.0
"""Units from one bar of a metric to the other."""

METRIC_STEP = 46.0
"""Units from one metric to the next."""

QUALITY_BARS_LEGEND = (
    LegendEntry(label="before", css="dense"),
    LegendEntry(label="after", css="compressed"),
)
"""What the colours say."""


def draw_quality_bars(before: Mapping[str, Quality], after: Mapping[str, Quality]) -> str:
    """Draw two bars for each metric.

    Args:
        before: Metrics of the dense pipeline.
        after: The same metrics of the compressed one.
    """
    labels = [_name_metric(metric, quality) for metric, quality in before.items()]
    longest_label = max((len(label) for label in labels), default=0)
    left = max(QUALITY_BARS_MIN_LEFT, CHARACTER_WIDTH * longest_label + 12)
    # An error rate may be above 100 %.
    highest = max((quality.high for quality in [*before.values(), *after.values()]), default=1.0)
    scale = Scale(low=0.0, high=max(1.0, highest), start=left, end=QUALITY_BARS_RIGHT)
    elements = draw_legend(left, 14, entries=QUALITY_BARS_LEGEND)
    for i, (metric, label) in enumerate(zip(before, labels, strict=True)):
        top = QUALITY_BARS_TOP + i * METRIC_STEP
        elements += _draw_bar(before[metric], scale, top=top, css="dense")
        elements += _draw_bar(after[metric], scale, top=top + QUALITY_BAR_STEP, css="compressed")
        elements.append(draw_text(left - 10, top + 20, text=label, anchor="end"))
    height = QUALITY_BARS_TOP + len(before) * METRIC_STEP
    return build_svg(WIDTH, height, elements=elements, label="quality before and after")


def _name_metric(metric: str, quality: Quality) -> str:
    """Return the name of a metric; it says where less is better."""
    return f"{metric} (less is better)" if quality.is_error_rate else metric


def _draw_bar(quality: Quality, scale: Scale, *, top: float, css: str) -> list[str]:
    """Draw one bar with its interval and its figure."""
    width = scale.place(quality.value) - scale.start
    middle = top + QUALITY_BAR_HEIGHT / 2
    interval_end = scale.place(quality.high)
    return [
        draw_rectangle(scale.start, top, width=width, height=QUALITY_BAR_HEIGHT, css=css),
        draw_line((scale.place(quality.low), middle), (interval_end, middle), css="interval"),
        draw_text(interval_end + 8, top + 11, text=format_percent(quality.value), css="small"),
    ]
