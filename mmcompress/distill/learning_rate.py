"""The learning rate of a training: its schedule, and a search for the highest harmless rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmcompress.distill.training import ADAM_BETAS, Training
from mmcompress.kinds.base import Batch

WARMUP_STEPS = 10
"""Steps over which the learning rate rises to its highest value."""

FINAL_RATE_SHARE = 0.02
"""Learning rate at the end of the schedule / its highest value."""

RATE_TRIAL_STEPS = 16
"""Steps that a learning rate is tried for: the warm-up, and a few at the full rate."""

RATE_MAX_LOSS_RATIO = 1.25
"""Loss of the steps behind the warm-up / loss before any step. Above it a rate does harm."""

MAX_RATE_HALVINGS = 4
"""Halvings of the learning rate at most."""

RATE_SEARCH_SHARE = 0.25
"""Share of the minutes of a training that the search for its rate may take. Without a search, a
rate that is too high wastes all minutes: clip_captioner at 2x ended where it had begun."""

MIN_STEPS_PER_RATE_TRIAL_STEP = 10
"""Steps of a training for each step of one trial, below which no rate is searched for."""

GENTLE_LOSS_RATIO = 1.5
"""Loss before training / dense loss below which a structure has lost little."""

GENTLE_RATE_SHARE = 1 / 8
"""Learning rate of such a structure / that of the settings, where none is searched for. On
clip_captioner at 2x the search ends there."""

FORWARDS_PER_STEP = 4
"""Forward passes that a step of training is taken to last as long as."""


def schedule_rate(highest: float, step: int, *, share: float) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine.

    Args:
        highest: The highest rate of the schedule.
        step: Steps that are done.
        share: Share of the budget that is used up, 0 .. 1.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    decay = cosine * (1 - FINAL_RATE_SHARE) + FINAL_RATE_SHARE
    return warm_up_rate(highest, step) * decay


def warm_up_rate(highest: float, step: int) -> float:
    """Return the learning rate of a step of the warm-up, and the highest one after it."""
    warmed_up = min(1.0, (step + 1) / WARMUP_STEPS)
    return highest * warmed_up


def choose_learning_rate(
    training: Training, *, steps: int, loss_ratio: float | None, deadline: float
) -> float:
    """Choose the highest learning rate of a training: by trials, if it has the steps and the time.

    Args:
        training: The training. Its settings hold the rate to start from.
        steps: Steps that it is asked for.
        loss_ratio: Loss before training / dense loss; None where it was not measured.
        deadline: Time on its clock, in seconds, by which trials end.

    Returns:
        The rate. Without trials that of the settings, or a share of it where little was lost.
    """
    settings = training.settings
    if not settings.find_learning_rate:
        return settings.learning_rate
    if steps >= MIN_STEPS_PER_RATE_TRIAL_STEP * RATE_TRIAL_STEPS:
        found_rate = find_learning_rate(training, deadline=deadline)
        if found_rate is not None:
            return found_rate
    has_lost_little = loss_ratio is not None and loss_ratio < GENTLE_LOSS_RATIO
    return settings.learning_rate * (GENTLE_RATE_SHARE if has_lost_little else 1.0)


def find_learning_rate(training: Training, *, deadline: float) -> float | None:
    """Halve the learning rate until a few steps of it no longer do harm.

    A structure that lost much learns fastest at a high rate. That rate throws one which lost little
    far from where it was. The weights are left as they were.

    Args:
        training: The training. Its settings hold the rate to start from.
        deadline: Time on its clock, in seconds, by which the search ends. Where even one trial
            would take longer, there is no search.

    Returns:
        The highest learning rate of the schedule; None without a search.
    """
    rate = training.settings.learning_rate
    # The first pass is slow: it allocates memory.
    forward_seconds = min(_time_forward(training, step) for step in range(2))
    trial_seconds = FORWARDS_PER_STEP * RATE_TRIAL_STEPS * forward_seconds
    if training.clock.read_seconds() + trial_seconds > deadline:
        return None
    batches = [training.draw_batch(step) for step in range(RATE_TRIAL_STEPS)]
    start = [weight.detach().clone() for weight in training.weights]
    loss_before = _add_losses(training, batches[WARMUP_STEPS:])
    max_loss = RATE_MAX_LOSS_RATIO * loss_before
    for _ in range(MAX_RATE_HALVINGS):
        does_harm = _try_rate_(training, rate, batches=batches, max_loss=max_loss)
        _restore_weights_(training, start)
        if not does_harm:
            break
        rate /= 2
        if training.clock.read_seconds() > deadline:
            break
    return rate


def _time_forward(training: Training, step: int) -> float:
    """Return the seconds of one forward pass."""
    batch = training.draw_batch(step)
    start = training.clock.read_seconds()
    with torch.no_grad():
        training.compute_losses(batch)
    return training.clock.read_seconds() - start


def _add_losses(training: Training, batches: list[Batch]) -> float:
    """Return the sum of the losses of some batches at the weights of now."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            for loss in training.compute_losses(batch).values():
                total += float(loss)
    return total


def _try_rate_(training: Training, rate: float, *, batches: list[Batch], max_loss: float) -> bool:
    """Train a few steps at a rate, until it is known whether it does harm.

    Args:
        training: The training; its weights are changed.
        rate: The highest learning rate.
        batches: The pairs of each step.
        max_loss: Sum of the losses of the steps behind the warm-up, above which a rate does harm.

    Returns:
        Whether it does harm.
    """
    optimizer = torch.optim.AdamW(training.weights, betas=ADAM_BETAS, weight_decay=0.0, fused=True)
    total_loss = 0.0
    for step, batch in enumerate(batches):
        losses = training.advance_(optimizer, batch, rate=warm_up_rate(rate, step))
        if step >= WARMUP_STEPS:
            total_loss += sum(losses.values())
        # No loss is negative, so further steps can't take it back.
        if not total_loss <= max_loss:
            return True
    return False


@torch.no_grad()
def _restore_weights_(training: Training, values: list[Tensor]) -> None:
    """Put earlier values of the weights back."""
    for weight, value in zip(training.weights, values, strict=True):
        weight.copy_(value)
