"""Several methods side by side: a panel for each metric, a row for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair

from mmcompress.report.charts.vega import (
    PAGE_WIDTH,
    Row,
    choose_color,
    layer_charts,
    make_chart,
    make_label_axis,
    render_chart,
)
from mmcompress.report.formats import format_percent
from mmcompress.results.records import Summary
from mmcompress.stats import Quality

METHOD_HEIGHT = 24
"""Pixels from one row to the next."""

LABEL_ROOM = 240
"""Pixels left of the first panel for the names of the methods."""

MIN_PANEL_WIDTH = 80
"""Pixels of width of a panel at least."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method."""

    label: str
    """Its name and its speedup."""
    quality: Mapping[str, Quality]
    """Its figures by metric."""


def draw_comparison(summaries: Mapping[str, Summary]) -> str:
    """Draw each metric of each method with its interval, the dense pipeline first."""
    methods = _list_methods(summaries)
    metrics = list(methods[0].quality)
    if not metrics:
        # Only the names of the methods are left to show.
        metrics = [""]
    room = (PAGE_WIDTH - LABEL_ROOM) / len(metrics)
    panels = [
        _draw_panel(methods, metric, index=i, width=max(MIN_PANEL_WIDTH, room - 30))
        for i, metric in enumerate(metrics)
    ]
    chart = altair.hconcat(*panels, spacing=24)
    return render_chart(chart, label="quality of every method")


def _list_methods(summaries: Mapping[str, Summary]) -> list[Method]:
    """Return the dense pipeline and every method."""
    first = next(iter(summaries.values()))
    methods = [Method(label="dense 1.00×", quality=first.baseline.quality)]
    for name, summary in summaries.items():
        label = f"{name} {summary.speedup:.2f}×"
        methods.append(Method(label=label, quality=summary.compressed.quality))
    return methods


def _draw_panel(
    methods: Sequence[Method], metric: str, *, index: int, width: float
) -> altair.LayerChart:
    """Draw one metric of all methods; the first panel names them."""
    rows: list[Row] = []
    for method in methods:
        quality = method.quality.get(metric)
        # A metric that failed there has no point.
        if quality is not None:
            rows.append(_make_row(method.label, metric, quality=quality))
    labels = [method.label for method in methods]
    axis = make_label_axis(labels, grid=True) if index == 0 else None
    y = altair.Y("method:N", sort=None, title=None, axis=axis, scale=altair.Scale(domain=labels))
    x = altair.X(
        "value:Q",
        title=None,
        axis=altair.Axis(format=".0%", tickCount=4),
        scale=altair.Scale(zero=False),
    )
    chart = make_chart(rows)
    is_error_rate = any(
        method.quality[metric].is_error_rate for method in methods if metric in method.quality
    )
    title = altair.TitleParams(text=metric, subtitle="less is better" if is_error_rate else "")
    layers = layer_charts(
        chart.mark_rule(aria=False).encode(x=altair.X("low:Q", title=None), x2="high:Q", y=y),
        chart.mark_circle(size=90, color=choose_color(index), opacity=1).encode(
            x=x, y=y, description="description:N"
        ),
    )
    return layers.properties(width=width, height=METHOD_HEIGHT * len(methods), title=title)


def _make_row(label: str, metric: str, *, quality: Quality) -> Row:
    """Return the row of one method in the panel of a metric."""
    return {
        "method": label,
        "value": quality.value,
        "low": quality.low,
        "high": quality.high,
        "description": f"{label}, {metric}: {format_percent(quality.value)}",
    }
