"""What charts and tables show of the trials of a search. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmcompress.results.records import Trial

SHOWN_SHARE = 0.9
"""Share of the losses that an axis holds; higher ones are drawn at its upper end."""


def list_front_trials(trials: Sequence[Trial]) -> list[Trial]:
    """List the trials that no other one beats in latency and in loss, the fastest first."""
    finite_trials = [trial for trial in trials if math.isfinite(trial.loss)]
    front: list[Trial] = []
    for trial in sorted(finite_trials, key=_get_place):
        if not front or trial.loss < front[-1].loss:
            front.append(trial)
    return front


def _get_place(trial: Trial) -> tuple[float, float]:
    """Return what trials are sorted by along a front."""
    return trial.latency_ms, trial.loss


def clip_loss(loss: float, highest: float) -> float:
    """Return the loss that is drawn: the upper end of an axis where it is higher or no number."""
    return min(loss, highest) if math.isfinite(loss) else highest


def find_loss_range(trials: Sequence[Trial]) -> tuple[float, float]:
    """Return the lowest loss, and the highest one but for the worst trials."""
    losses = sorted(trial.loss for trial in trials if math.isfinite(trial.loss))
    if not losses:
        return 0.0, 1.0
    highest = losses[min(len(losses) - 1, int(len(losses) * SHOWN_SHARE))]
    return losses[0], highest if highest > 0 else 1.0
