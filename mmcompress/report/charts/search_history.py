"""How the search went on: the loss of every trial in order, and the best one so far."""

from __future__ import annotations

import math

import altair

from mmcompress.report.charts.vega import (
    SOFT_INK,
    Row,
    choose_color,
    fit_page_width,
    layer_charts,
    make_chart,
    render_chart,
)
from mmcompress.report.trial_rows import clip_loss, find_loss_range
from mmcompress.results.records import Summary, Trial

HISTORY_HEIGHT = 260
"""Pixels of height."""

MIN_DRAWN_TRIALS = 3
"""Trials from which on their order says something."""


def draw_search_history(summary: Summary) -> str:
    """Draw a circle for each trial, and a line of the best loss within the target so far.

    Nothing where there are hardly any trials.
    """
    if len(summary.trials) < MIN_DRAWN_TRIALS:
        return ""
    lowest, highest = find_loss_range(summary.trials)
    rows: list[Row] = []
    best_rows: list[Row] = []
    best_loss = math.inf
    for place, trial in enumerate(sorted(summary.trials, key=_get_number)):
        is_within = trial.latency_ms <= summary.target.latency_ms
        if is_within and trial.loss < best_loss:
            best_loss = trial.loss
        if math.isfinite(best_loss):
            best_rows.append({"place": place, "loss": clip_loss(best_loss, highest)})
        rows.append(
            {
                "place": place,
                "loss": clip_loss(trial.loss, highest),
                "within": is_within,
                "description": f"trial {place}: loss {trial.loss:.3f}, {trial.latency_ms:.2f} ms",
            }
        )
    x = altair.X(
        "place:Q",
        title="trial, in order",
        axis=altair.Axis(format="d", tickMinStep=1),
        scale=altair.Scale(domain=[-1, len(rows)], nice=False),
    )
    y = altair.Y(
        "loss:Q",
        title="loss",
        scale=altair.Scale(domain=[0.95 * lowest, 1.05 * highest], nice=False, zero=False),
    )
    circles = make_chart(rows).mark_circle(size=40, opacity=0.8)
    layers = [
        circles.encode(
            x=x,
            y=y,
            color=altair.condition(
                "datum.within", altair.value(choose_color(0)), altair.value(SOFT_INK)
            ),
            description="description:N",
        )
    ]
    if best_rows:
        line = make_chart(best_rows).mark_line(
            interpolate="step-after", color=choose_color(1), strokeWidth=2, aria=False
        )
        layers.append(line.encode(x=x, y=y))
    chart = fit_page_width(layer_charts(*layers), height=HISTORY_HEIGHT)
    return render_chart(chart, label="loss of the trials in order")


def _get_number(trial: Trial) -> int:
    """Return the number of a trial in the study."""
    return trial.number
