"""Several methods side by side: a panel for each metric, a row for each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmcompress.report.charts.svg import (
    WIDTH,
    Scale,
    build_svg,
    choose_color,
    draw_circle,
    draw_line,
    draw_text,
)
from mmcompress.results.records import Summary
from mmcompress.stats import Quality

MIN_LEFT = 150.0
"""Units left of the panels at least, for the names of the methods."""

CHARACTER_WIDTH = 7.0
"""Units of width of a character of a name."""

PANEL_GAP = 30.0
"""Units between two panels."""

TOP = 34.0
"""Units above the first row."""

ROW_STEP = 24.0
"""Units from one row to the next."""

MIN_RANGE = 1e-6
"""Least difference between the ends of a scale."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method."""

    label: str
    """Its name and its speedup."""
    quality: Mapping[str, Quality]
    """Its figures by metric."""


def draw_comparison(summaries: Mapping[str, Summary]) -> str:
    """Draw each metric of each method with its interval, the dense pipeline first."""
    rows = _list_rows(summaries)
    metrics = list(rows[0].quality)
    left = max(MIN_LEFT, CHARACTER_WIDTH * max(len(row.label) for row in rows) + 20)
    panel_step = (WIDTH - left - 20) / len(metrics)
    elements: list[str] = []
    for i, metric in enumerate(metrics):
        start = left + i * panel_step
        scale = _fit_scale(rows, metric, start=start, end=start + panel_step - PANEL_GAP)
        elements += _draw_panel(rows, metric, scale=scale, color=choose_color(i))
    for i, row in enumerate(rows):
        elements.append(draw_text(left - 14, TOP + 4 + i * ROW_STEP, text=row.label, anchor="end"))
    height = TOP + 10 + len(rows) * ROW_STEP
    return build_svg(WIDTH, height, elements=elements, label="methods compared")


def _list_rows(summaries: Mapping[str, Summary]) -> list[Row]:
    """Return the dense pipeline and every method."""
    first = next(iter(summaries.values()))
    rows = [Row(label="dense 1.00×", quality=first.baseline.quality)]
    for name, summary in summaries.items():
        label = f"{name} {summary.speedup:.2f}×"
        rows.append(Row(label=label, quality=summary.compressed.quality))
    return rows


def _fit_scale(rows: list[Row], metric: str, *, start: float, end: float) -> Scale:
    """Return the scale of a panel, which holds the intervals of all rows."""
    low = min(row.quality[metric].low for row in rows)
    high = max(row.quality[metric].high for row in rows)
    return Scale(low=low, high=max(high, low + MIN_RANGE), start=start, end=end)


def _draw_panel(rows: list[Row], metric: str, *, scale: Scale, color: str) -> list[str]:
    """Draw one metric of all rows."""
    title = metric
    if rows[0].quality[metric].is_error_rate:
        title += " (less is better)"
    elements = [draw_text(scale.start, 14, text=title, css="small")]
    for i, row in enumerate(rows):
        quality = row.quality[metric]
        y = TOP + i * ROW_STEP
        interval_start = (scale.place(quality.low), y)
        interval_end = (scale.place(quality.high), y)
        elements.append(draw_line(interval_start, interval_end, css="interval"))
        x = scale.place(quality.value)
        elements.append(draw_circle(x, y, radius=5, fill=color, title=f"{quality.value:.1%}"))
    return elements
