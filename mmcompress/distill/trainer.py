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
from mmcompress.distill.step_plan import StepPlan, choose_step_count
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

    The learning rate follows a schedule over all steps. They are those of the settings, or as many
    as the minutes afford. The loss on validation pairs is taken at the start and a few times after
    it. When it was clearly lower before the end, the weights of that time are kept.

    Args:
        student: The models to train, by node.
        inputs: The pipeline, the teacher and the data.
        options: The settings of the spec, and where to report, record and resume.

    Returns:
        The loss curve: rows of `step`, `loss` and the parts of the loss. Empty without a budget.
        A training that stops for now writes no history yet.
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
    best = BestWeights(student, inputs, count=settings.validations, clock=options.clock)
    start = options.clock.now()
    state = _resume_(training, optimizer, best=best)
    if state is not None:
        start -= state.elapsed
    else:
        state = _begin_training(training, best=best, start=start)
    plan = StepPlan(
        asked_steps=state.asked_steps,
        max_seconds=settings.minutes * options.budget_share * 60,
        planned_steps=state.planned_steps,
    )

    losses: dict[str, float] = {}
    while state.share < 1:
        if state.share >= options.stop_share:
            if losses and state.curve[-1]["step"] != state.step:
                state.curve.append(_make_curve_row(state.step, losses))
            _save_checkpoint(training, optimizer, state=state, best=best, is_due=True)
            return state.curve
        best.validate(state.share, state.step)
        if settings.patience and best.unimproved_validations >= settings.patience:
            break
        step_start = options.clock.now()
        batch = training.draw_batch(state.step)
        rate = schedule_rate(state.rate, state.step, share=state.share)
        losses = training.advance_(optimizer, batch, rate=rate)
        state.step += 1
        now = options.clock.now()
        state.elapsed = now - start
        state.note_step_seconds(now - step_start)
        if not state.planned_steps:
            plan.lay_out(
                state.step,
                elapsed=state.elapsed,
                step_seconds=state.step_seconds,
                reserved=best.estimate_seconds_left(),
            )
            state.planned_steps = plan.planned_steps
            _tell_plan(plan, state, options=options)
        state.share = plan.compute_share(state.step, elapsed=state.elapsed)
        if state.step % CURVE_STEPS == 1:
            state.curve.append(_make_curve_row(state.step, losses))
            loss = state.curve[-1]["loss"]
            options.progress(f"step {state.step}, loss {loss:.3f}", min(state.share, 1.0))
        _save_checkpoint(training, optimizer, state=state, best=best)

    if losses and state.curve[-1]["step"] != state.step:
        state.curve.append(_make_curve_row(state.step, losses))
    best.validate(1.0, state.step)
    best.restore_()
    _write_history(training, state, best=best)
    return state.curve


def _begin_training(training: Training, *, best: BestWeights, start: float) -> TrainingState:
    """Take the loss before training, and choose the number of steps and the learning rate."""
    options = training.options
    settings = options.settings
    best.validate(0.0, 0)
    if training.compares_blocks:
        options.progress(
            "outputs of blocks are compared (distill.losses.hidden or cross), so the dense "
            "pipeline runs anew for every pair",
            None,
        )
    loss_ratio = options.loss_ratio
    if best.validations:
        loss = best.validations[0]["validation_loss"]
        options.progress(
            f"the loss on validation pairs is {loss:.3f}; that of the dense pipeline is "
            f"{best.dense_loss:.3f}",
            0.0,
        )
        if loss_ratio is None and best.dense_loss > 0:
            loss_ratio = loss / best.dense_loss
    steps = choose_step_count(settings, loss_ratio=loss_ratio, share=options.budget_share)
    state = TrainingState(rate=settings.learning_rate, asked_steps=max(1, steps))
    if is_rate_searched(settings, steps=state.asked_steps):
        minutes = settings.minutes * options.budget_share
        deadline = start + RATE_SEARCH_SHARE * minutes * 60
        state.rate = find_learning_rate(training, deadline=deadline)
        options.progress(f"the learning rate is {state.rate:.2g}", 0.0)
    return state


def _tell_plan(plan: StepPlan, state: TrainingState, *, options: TrainingOptions) -> None:
    """Tell the user how many steps the training will have, once that is known."""
    if not plan.planned_steps:
        return
    if plan.planned_steps < plan.asked_steps:
        options.progress(
            f"a step takes {state.step_seconds:.2f} s: {plan.planned_steps} of "
            f"{plan.asked_steps} steps fit into {plan.max_seconds / 60:.3g} minutes "
            "(distill.minutes)",
            None,
        )


def _write_history(training: Training, state: TrainingState, *, best: BestWeights) -> None:
    """Write the losses of training and validation, where a file is asked for."""
    options = training.options
    if options.history is None:
        return
    first_row = {
        "step": 0,
        "rate": state.rate,
        "bf16": float(training.uses_bf16),
        "asked_steps": state.asked_steps,
        "planned_steps": state.planned_steps or state.asked_steps,
        "seconds": state.elapsed,
    }
    rows = [first_row, *state.curve, *best.validations]
    try:
        write_record(options.history, to_plain(rows))
    except DiskFull as error:
        # The trained weights are worth more, and are written next.
        options.progress(f"{error}; the losses of the training are not kept", None)


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
    is_due: bool = False,
) -> None:
    """Save the state of a training, when it is time to."""
    checkpoint = training.options.checkpoint
    if checkpoint is None or not (is_due or checkpoint.is_due(state.elapsed)):
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
