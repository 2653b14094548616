"""Distillation of a pruned pipeline from the dense one: all models at once, on its own data."""

from __future__ import annotations

import torch

from mmcompress.distill.best_weights import BestWeights
from mmcompress.distill.checkpoint import TrainingState
from mmcompress.distill.learning_rate import (
    RATE_SEARCH_SHARE,
    find_learning_rate,
    is_rate_searched,
    schedule_rate,
)
from mmcompress.distill.training import Training, TrainingInputs, TrainingOptions
from mmcompress.errors import DiskFull
from mmcompress.kinds.base import Models
from mmcompress.storage import to_plain, write_record

CURVE_STEPS = 5
"""Steps between two rows of the loss curve."""


def distill_models_(
    student: Models, inputs: TrainingInputs, *, options: TrainingOptions
) -> list[dict[str, float]]:
    """Train pruned models in place.

    Training ends after the steps or the minutes of the settings, whichever come first; the learning
    rate follows both. The loss on validation pairs is taken at the start and a few times after it.
    When it was clearly lower before the end, the weights of that time are kept.

    Args:
        student: The models to train, by node.
        inputs: The pipeline, the teacher and the data.
        options: The settings of the spec, and where to report, record and resume.

    Returns:
        The loss curve: rows of `step`, `loss` and the parts of the loss. Empty without a budget.
    """
    settings = options.settings
    if settings.steps == 0 or settings.minutes == 0:
        return []
    torch.manual_seed(options.seed)
    for model in student.values():
        # What is trained is what is deployed: no dropout, batch norms keep their statistics.
        model.eval()
    training = Training(student, inputs, options=options)
    optimizer = training.make_optimizer()
    best = BestWeights(student, inputs, count=settings.validations)
    start = options.clock.read_seconds()
    state = _resume_(training, optimizer, best=best)
    if state is not None:
        start -= state.elapsed
    else:
        state = TrainingState(rate=settings.learning_rate)
        if is_rate_searched(settings):
            deadline = start + RATE_SEARCH_SHARE * settings.minutes * 60
            state.rate = find_learning_rate(training, deadline=deadline)
            options.progress(f"the learning rate is {state.rate:.2g}", 0.0)

    losses: dict[str, float] = {}
    while state.share < 1:
        best.validate(state.share, state.step)
        if state.step == 0 and best.validations:
            loss = best.validations[0]["validation_loss"]
            options.progress(
                f"the loss on validation pairs is {loss:.3f}; that of the dense pipeline is "
                f"{best.dense_loss:.3f}",
                0.0,
            )
        if settings.patience and best.unimproved_validations >= settings.patience:
            break
        batch = training.draw_batch(state.step)
        rate = schedule_rate(state.rate, state.step, share=state.share)
        losses = training.advance_(optimizer, batch, rate=rate)
        state.step += 1
        state.elapsed = options.clock.read_seconds() - start
        share_of_steps = state.step / settings.steps
        share_of_minutes = state.elapsed / (settings.minutes * 60)
        state.share = max(share_of_steps, share_of_minutes)
        if state.step % CURVE_STEPS == 1:
            state.curve.append(_make_curve_row(state.step, losses))
            loss = state.curve[-1]["loss"]
            options.progress(f"step {state.step}, loss {loss:.3f}", min(state.share, 1.0))
        _save_checkpoint(training, optimizer, state=state, best=best)

    if losses and state.curve[-1]["step"] != state.step:
        state.curve.append(_make_curve_row(state.step, losses))
    best.validate(1.0, state.step)
    best.restore_()
    if options.history is not None:
        first_row = {"step": 0, "rate": state.rate, "bf16": float(training.uses_bf16)}
        rows = [first_row, *state.curve, *best.validations]
        try:
            write_record(options.history, to_plain(rows))
        except DiskFull as error:
            # The trained weights are worth more, and are written next.
            options.progress(f"{error}; the losses of the training are not kept", None)
    return state.curve


def _resume_(
    training: Training, optimizer: torch.optim.Optimizer, *, best: BestWeights
) -> TrainingState | None:
    """Put the last checkpoint back in place; returns its state, None when there is none."""
    checkpoint = training.options.checkpoint
    if checkpoint is None:
        return None
    saved = checkpoint.load_(training.weights, optimizer)
    if saved is None:
        return None
    state, best.weights = saved
    best.validations = state.validations
    best.unimproved_validations = state.unimproved_validations
    return state


def _save_checkpoint(
    training: Training,
    optimizer: torch.optim.Optimizer,
    *,
    state: TrainingState,
    best: BestWeights,
) -> None:
    """Save the state of a training, when it is time to."""
    checkpoint = training.options.checkpoint
    if checkpoint is None or not checkpoint.is_due(state.elapsed):
        return
    state.validations = best.validations
    state.unimproved_validations = best.unimproved_validations
    try:
        checkpoint.save(state, training.weights, optimizer=optimizer, best_weights=best.weights)
    except DiskFull as error:
        checkpoint.last_saved_at = state.elapsed
        training.options.progress(
            f"{error}; the training goes on, and an interruption would cost what came after the "
            "last checkpoint",
            None,
        )


def _make_curve_row(step: int, losses: dict[str, float]) -> dict[str, float]:
    """Return a row of the loss curve: the step, the loss, and its parts."""
    loss = sum(losses.values())
    return {"step": step, "loss": loss, **losses}
