"""Several methods side by side: a panel for each metric, a row for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmcompress.report.charts.svg import (
    CHARACTER_WIDTH,
    WIDTH,
    Scale,
    build_svg,
    choose_color,
    draw_circle,
    draw_line,
    draw_text,
    format_ticks,
    shorten_text,
)
from mmcompress.report.formats import format_percent
from mmcompress.results.records import Summary
from mmcompress.stats import Quality

COMPARISON_MIN_LEFT = 130.0
"""Units left of the panels at least, for the names of the methods."""

MAX_LEFT = WIDTH / 2.5
"""Units left of the panels at most; longer names are cut off."""

PANEL_GAP = 48.0
"""Units between two panels."""

COMPARISON_TOP = 50.0
"""Units above the first row, for two lines of title."""

COMPARISON_ROW_STEP = 24.0
"""Units from one row to the next."""

MIN_RANGE = 1e-6
"""Least difference between the ends of a scale."""

TICK_WIDTH = 40.0
"""Units of width of the text of a tick."""


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
    longest_label = max(len(row.label) for row in rows)
    left = min(MAX_LEFT, max(COMPARISON_MIN_LEFT, CHARACTER_WIDTH * longest_label + 20))
    panel_step = (WIDTH - left) / max(1, len(metrics))
    elements: list[str] = []
    for i, row in enumerate(rows):
        label = shorten_text(row.label, left - 14)
        y = COMPARISON_TOP + 4 + i * COMPARISON_ROW_STEP
        elements.append(draw_text(left - 14, y, text=label, anchor="end"))
    for i, metric in enumerate(metrics):
        start = left + i * panel_step
        scale = _fit_scale(rows, metric, start=start, end=start + panel_step - PANEL_GAP)
        elements += _draw_panel_frame(rows, metric, scale=scale)
        elements += _draw_panel_rows(rows, metric, scale=scale, color=choose_color(i))
    height = COMPARISON_TOP + len(rows) * COMPARISON_ROW_STEP + 20
    return build_svg(WIDTH, height, elements=elements, label="quality of every method")


def _list_rows(summaries: Mapping[str, Summary]) -> list[Row]:
    """Return the dense pipeline and every method."""
    first = next(iter(summaries.values()))
    rows = [Row(label="dense 1.00×", quality=first.baseline.quality)]
    for name, summary in summaries.items():
        label = f"{name} {summary.speedup:.2f}×"
        rows.append(Row(label=label, quality=summary.compressed.quality))
    return rows


def _fit_scale(rows: Sequence[Row], metric: str, *, start: float, end: float) -> Scale:
    """Return the scale of a panel, which holds the intervals of all rows."""
    figures = [row.quality[metric] for row in rows if metric in row.quality]
    low = min(figure.low for figure in figures)
    high = max(figure.high for figure in figures)
    return Scale(low=low, high=max(high, low + MIN_RANGE), start=start, end=end)


def _draw_panel_frame(rows: Sequence[Row], metric: str, *, scale: Scale) -> list[str]:
    """Draw the title and the axis of one metric."""
    width = scale.end - scale.start
    title = shorten_text(metric, width + PANEL_GAP - 6)
    elements = [draw_text(scale.start, 14, text=title)]
    if rows[0].quality[metric].is_error_rate:
        elements.append(draw_text(scale.start, 29, text="less is better", css="small"))
    bottom = COMPARISON_TOP + (len(rows) - 0.5) * COMPARISON_ROW_STEP
    shares = scale.list_ticks(max(3, int(width / TICK_WIDTH)))
    for share, text in zip(shares, format_ticks(shares, is_share=True), strict=True):
        x = scale.place(share)
        elements.append(
            draw_line((x, COMPARISON_TOP - COMPARISON_ROW_STEP / 2), (x, bottom), css="grid")
        )
        elements.append(draw_text(x, bottom + 16, text=text, css="small", anchor="middle"))
    return elements


def _draw_panel_rows(rows: Sequence[Row], metric: str, *, scale: Scale, color: str) -> list[str]:
    """Draw one metric of all rows, each with its interval."""
    elements: list[str] = []
    for i, row in enumerate(rows):
        quality = row.quality.get(metric)
        if quality is None:
            # The metric failed there.
            continue
        y = COMPARISON_TOP + i * COMPARISON_ROW_STEP
        interval_start = (scale.place(quality.low), y)
        interval_end = (scale.place(quality.high), y)
        elements.append(draw_line(interval_start, interval_end, css="interval"))
        x = scale.place(quality.value)
        elements.append(
            draw_circle(x, y, radius=5, fill=color, title=format_percent(quality.value))
        )
    return elements
