"""Every trial of the search: predicted latency against the loss that it was evaluated by."""

from __future__ import annotations

import math

from mmcompress.graph.structure import Candidate
from mmcompress.report.charts.svg import (
    WIDTH,
    LegendEntry,
    Scale,
    build_svg,
    draw_circle,
    draw_legend,
    draw_line,
    draw_text,
    format_ticks,
)
from mmcompress.results.records import LEVEL_SWITCH_ORIGIN, Summary, Trial

TRIALS_HEIGHT = 312.0
"""Units of height."""

TRIALS_LEFT = 60.0
"""Units left of the plot."""

TRIALS_RIGHT = WIDTH - 16
"""Units from the left edge to the right end of the plot."""

TRIALS_TOP = 44.0
"""Units above the plot, for the legend and the name of the target."""

TRIALS_BOTTOM = TRIALS_HEIGHT - 40
"""Units from the upper edge to the lower end of the plot."""

SHOWN_SHARE = 0.95
"""Share of the trials whose loss fits the scale. Higher losses lie at its upper end, so that a few
collapsed trials don't press all others together."""

TRIALS_LEGEND = (
    LegendEntry(label="sampler or split of the budget", css="trial"),
    LegendEntry(label="level switch around the best", css="mutation"),
)
"""What the colours say."""


def draw_trials(summary: Summary) -> str:
    """Draw a circle for each trial; the chosen one is ringed. Nothing when there are no trials."""
    if not summary.trials:
        return ""
    latency_scale = _fit_latency_scale(summary)
    loss_scale = _fit_loss_scale(summary.trials)
    elements = _draw_axes(latency_scale, loss_scale)
    elements += draw_legend(TRIALS_LEFT, 12, entries=TRIALS_LEGEND)
    target_x = latency_scale.place(summary.target.latency_ms)
    elements.append(draw_line((target_x, TRIALS_TOP - 4), (target_x, TRIALS_BOTTOM), css="target"))
    anchor = "end" if target_x > WIDTH / 2 else "start"
    elements.append(draw_text(target_x, TRIALS_TOP - 8, text="target", css="small", anchor=anchor))
    chosen_trial = _find_chosen_trial(summary)
    for trial in summary.trials:
        x = latency_scale.place(trial.latency_ms)
        y = loss_scale.place(_limit_loss(trial.loss, loss_scale.high))
        css = "trial mutation" if trial.origin == LEVEL_SWITCH_ORIGIN else "trial"
        elements.append(draw_circle(x, y, radius=4, css=css, title=_describe_trial(trial)))
        if trial is chosen_trial:
            elements.append(draw_circle(x, y, radius=8, css="chosen"))
    return build_svg(WIDTH, TRIALS_HEIGHT, elements=elements, label="trials of the search")


def _fit_latency_scale(summary: Summary) -> Scale:
    """Return the scale that holds every trial and the target."""
    latencies = [trial.latency_ms for trial in summary.trials]
    latencies.append(summary.target.latency_ms)
    return Scale(
        low=min(latencies) * 0.98, high=max(latencies) * 1.02, start=TRIALS_LEFT, end=TRIALS_RIGHT
    )


def _fit_loss_scale(trials: tuple[Trial, ...]) -> Scale:
    """Return the scale that holds all losses but the highest."""
    losses = sorted(trial.loss for trial in trials if math.isfinite(trial.loss))
    if not losses:
        return Scale(low=0.0, high=0.0, start=TRIALS_TOP, end=TRIALS_TOP)
    highest_shown = losses[min(len(losses) - 1, int(len(losses) * SHOWN_SHARE))]
    return Scale(
        low=losses[0] * 0.95, high=highest_shown * 1.05, start=TRIALS_BOTTOM, end=TRIALS_TOP
    )


def _limit_loss(loss: float, highest: float) -> float:
    """Return the loss at which a trial is drawn: the upper end for what is higher or no number."""
    return min(loss, highest) if math.isfinite(loss) else highest


def _draw_axes(latency_scale: Scale, loss_scale: Scale) -> list[str]:
    """Draw the grid, the ticks and the names of both axes."""
    elements: list[str] = []
    losses = loss_scale.list_ticks()
    for loss, text in zip(losses, format_ticks(losses), strict=True):
        y = loss_scale.place(loss)
        elements.append(draw_line((TRIALS_LEFT, y), (TRIALS_RIGHT, y), css="grid"))
        elements.append(draw_text(TRIALS_LEFT - 8, y + 4, text=text, css="small", anchor="end"))
    latencies = latency_scale.list_ticks()
    for latency_ms, text in zip(latencies, format_ticks(latencies), strict=True):
        x = latency_scale.place(latency_ms)
        elements.append(draw_text(x, TRIALS_BOTTOM + 18, text=text, css="small", anchor="middle"))
    middle = (TRIALS_LEFT + TRIALS_RIGHT) / 2
    elements.append(
        draw_text(
            middle, TRIALS_HEIGHT - 4, text="predicted latency, ms", css="small", anchor="middle"
        )
    )
    elements.append(
        draw_text(TRIALS_LEFT - 8, TRIALS_TOP - 8, text="loss", css="small", anchor="end")
    )
    return elements


def _find_chosen_trial(summary: Summary) -> Trial | None:
    """Return the first trial of the structure and precisions that were chosen, if there is one."""
    precision = {name: node.precision for name, node in summary.compressed.nodes.items()}
    chosen_candidate = Candidate(kept_units=summary.kept_units, precision=precision)
    for trial in summary.trials:
        if trial.candidate == chosen_candidate:
            return trial
    return None


def _describe_trial(trial: Trial) -> str:
    """Return what is shown under the mouse."""
    figures = f"{trial.latency_ms:.2f} ms, loss {trial.loss:.3f}"
    return f"trial {trial.number} ({trial.origin}): {figures}"
