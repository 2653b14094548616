"""Every trial of the search: predicted latency against the loss that it was evaluated by."""

from __future__ import annotations

import altair

from mmcompress.graph.structure import Candidate
from mmcompress.report.charts.vega import (
    SOFT_INK,
    TARGET_COLOR,
    Row,
    choose_color,
    draw_target_line,
    fit_page_width,
    layer_charts,
    make_chart,
    render_chart,
)
from mmcompress.report.trial_rows import clip_loss, find_loss_range, list_front_trials
from mmcompress.results.records import LEVEL_SWITCH_ORIGIN, Summary, Trial

TRIALS_HEIGHT = 330
"""Pixels of height."""

SAMPLED_NAME = "sampler or split of the budget"
"""Series of the trials that the search proposed."""

SWITCHED_NAME = "level switch of the best structure"
"""Series of the trials next to the best one."""

INFEASIBLE_NAME = "over the target"
"""Series of the trials that are predicted to miss the target."""


def draw_trials(summary: Summary) -> str:
    """Draw a circle for each trial, and a line along those that no other one beats.

    The chosen one is ringed. Nothing when there are no trials.
    """
    if not summary.trials:
        return ""
    lowest, highest = find_loss_range(summary.trials)
    latencies = [trial.latency_ms for trial in summary.trials] + [summary.target.latency_ms]
    x = altair.X(
        "latency:Q",
        title="predicted latency, ms",
        scale=altair.Scale(
            domain=[0.98 * min(latencies), 1.02 * max(latencies)], nice=False, zero=False
        ),
    )
    y = altair.Y(
        "loss:Q",
        title="loss",
        scale=altair.Scale(domain=[0.95 * lowest, 1.05 * highest], nice=False, zero=False),
    )
    limit_ms = summary.target.latency_ms
    rows = [_make_row(trial, highest, limit_ms=limit_ms) for trial in summary.trials]
    color = altair.Color(
        "origin:N",
        sort=None,
        scale=altair.Scale(
            domain=[SAMPLED_NAME, SWITCHED_NAME, INFEASIBLE_NAME],
            range=[choose_color(0), choose_color(1), SOFT_INK],
        ),
    )
    circles = make_chart(rows).mark_circle(size=60, opacity=0.8)
    front = [
        _make_row(trial, highest, limit_ms=limit_ms)
        for trial in list_front_trials(summary.trials)
        if trial.loss <= highest
    ]
    layers = [
        make_chart(front)
        .mark_line(interpolate="step-after", color=SOFT_INK, strokeWidth=1.2, aria=False)
        .encode(x=x, y=y),
        circles.encode(x=x, y=y, color=color, description="description:N"),
        *draw_target_line(summary.target.latency_ms, text="target"),
    ]
    chosen = _find_chosen_trial(summary)
    if chosen is not None:
        ring = make_chart([_make_row(chosen, highest, limit_ms=limit_ms)])
        layers.append(
            ring.mark_point(size=220, color=TARGET_COLOR, strokeWidth=2).encode(
                x=x, y=y, description="ring:N"
            )
        )
    chart = fit_page_width(layer_charts(*layers), height=TRIALS_HEIGHT)
    return render_chart(chart, label="trials of the search")


def _make_row(trial: Trial, highest: float, *, limit_ms: float) -> Row:
    """Return the row of a trial; it lies at the upper end where its loss is higher or no number."""
    series = SWITCHED_NAME if trial.origin == LEVEL_SWITCH_ORIGIN else SAMPLED_NAME
    if trial.latency_ms > limit_ms:
        series = INFEASIBLE_NAME
    figures = f"{trial.latency_ms:.2f} ms, loss {trial.loss:.3f}"
    return {
        "latency": trial.latency_ms,
        "loss": clip_loss(trial.loss, highest),
        "origin": series,
        "description": f"trial {trial.number} ({trial.origin_name}): {figures}",
        "ring": f"chosen: trial {trial.number}",
    }


def _find_chosen_trial(summary: Summary) -> Trial | None:
    """Return the first trial of the structure and precisions that were chosen, if there is one."""
    precision = {name: node.precision for name, node in summary.compressed.nodes.items()}
    chosen_candidate = Candidate(kept_units=summary.kept_units, precision=precision)
    for trial in summary.trials:
        if trial.candidate == chosen_candidate:
            return trial
    return None
