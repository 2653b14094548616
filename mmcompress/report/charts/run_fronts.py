"""The fronts of several runs over each other: what their searches reached at every latency."""

from __future__ import annotations

from collections.abc import Mapping

import altair

from mmcompress.report.charts.vega import (
    Row,
    choose_color,
    fit_page_width,
    layer_charts,
    make_chart,
    render_chart,
)
from mmcompress.report.trial_rows import list_front_trials
from mmcompress.results.records import Summary

FRONTS_HEIGHT = 340
"""Pixels of height."""

FrontPoint = tuple[float, float]
"""Predicted latency / dense latency, and loss."""


def list_front(summary: Summary) -> list[FrontPoint]:
    """List the trials that no other one beats: (latency / dense latency, loss), fastest first."""
    dense_ms = summary.baseline.latency_ms.p50
    front = list_front_trials(summary.trials)
    return [(trial.latency_ms / dense_ms, trial.loss) for trial in front]


def draw_run_fronts(runs: Mapping[str, Summary]) -> str:
    """Draw a line for each run; nothing where no run has trials.

    Args:
        runs: The summaries by name.
    """
    rows: list[Row] = []
    for name, summary in runs.items():
        for share, loss in list_front(summary):
            figures = f"{share:.1%} of the dense latency, loss {loss:.3f}"
            rows.append(
                {"run": name, "share": share, "loss": loss, "description": f"{name}: {figures}"}
            )
    if not rows:
        return ""
    scale = altair.Scale(zero=False)
    names = list(runs)
    colors = [choose_color(i) for i in range(len(names))]
    lines = make_chart(rows).encode(
        x=altair.X(
            "share:Q",
            title="predicted latency / dense latency",
            axis=altair.Axis(format=".0%"),
            scale=scale,
        ),
        y=altair.Y("loss:Q", title="loss", scale=scale),
        color=altair.Color("run:N", sort=None, scale=altair.Scale(domain=names, range=colors)),
    )
    layers = layer_charts(
        lines.mark_line(strokeWidth=1.5, aria=False),
        lines.mark_circle(size=60, opacity=1).encode(description="description:N"),
    )
    chart = fit_page_width(layers, height=FRONTS_HEIGHT)
    return render_chart(chart, label="fronts of the runs")
