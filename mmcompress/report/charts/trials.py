"""Every trial of the search: predicted latency against the loss that it was evaluated by."""

from __future__ import annotations

import math

import altair

from mmcompress.graph.structure import Candidate
from mmcompress.report.charts.vega import (
    TARGET_COLOR,
    Row,
    choose_color,
    draw_target_line,
    fit_page_width,
    layer_charts,
    make_chart,
    render_chart,
)
from mmcompress.results.records import LEVEL_SWITCH_ORIGIN, Summary, Trial

TRIALS_HEIGHT = 330
"""Pixels of height."""

SHOWN_SHARE = 0.9
"""Share of the losses that the axis holds; higher ones are drawn at its upper end."""

SAMPLED_NAME = "sampler or split of the budget"
"""Series of the trials that the search proposed."""

SWITCHED_NAME = "level switch of the best structure"
"""Series of the trials next to the best one."""


def draw_trials(summary: Summary) -> str:
    """Draw a circle for each trial; the chosen one is ringed. Nothing when there are no trials."""
    if not summary.trials:
        return ""
    lowest, highest = _find_loss_range(summary.trials)
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
    rows = [_make_row(trial, highest) for trial in summary.trials]
    color = altair.Color(
        "origin:N",
        sort=None,
        scale=altair.Scale(
            domain=[SAMPLED_NAME, SWITCHED_NAME], range=[choose_color(0), choose_color(1)]
        ),
    )
    circles = make_chart(rows).mark_circle(size=60, opacity=0.8)
    layers = [
        circles.encode(x=x, y=y, color=color, description="description:N"),
        *draw_target_line(summary.target.latency_ms, text="target"),
    ]
    chosen = _find_chosen_trial(summary)
    if chosen is not None:
        ring = make_chart([_make_row(chosen, highest)])
        layers.append(
            ring.mark_point(size=220, color=TARGET_COLOR, strokeWidth=2).encode(
                x=x, y=y, description="ring:N"
            )
        )
    chart = fit_page_width(layer_charts(*layers), height=TRIALS_HEIGHT)
    return render_chart(chart, label="trials of the search")


def _find_loss_range(trials: tuple[Trial, ...]) -> tuple[float, float]:
    """Return the lowest loss, and the highest one but for the worst trials."""
    losses = sorted(trial.loss for trial in trials if math.isfinite(trial.loss))
    if not losses:
        return 0.0, 1.0
    highest = losses[min(len(losses) - 1, int(len(losses) * SHOWN_SHARE))]
    return losses[0], highest if highest > 0 else 1.0


def _make_row(trial: Trial, highest: float) -> Row:
    """Return the row of a trial; it lies at the upper end where its loss is higher or no number."""
    loss = min(trial.loss, highest) if math.isfinite(trial.loss) else highest
    is_switched = trial.origin == LEVEL_SWITCH_ORIGIN
    figures = f"{trial.latency_ms:.2f} ms, loss {trial.loss:.3f}"
    return {
        "latency": trial.latency_ms,
        "loss": loss,
        "origin": SWITCHED_NAME if is_switched else SAMPLED_NAME,
        "description": f"trial {trial.number} ({trial.origin}): {figures}",
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
