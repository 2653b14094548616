"""Distillation of a pruned pipeline from the dense one: all models at once, on its own data."""

from __future__ import annotations

from mmcompress.distill.converge import train_until_converged_
from mmcompress.distill.learning_rate import schedule_rate
from mmcompress.distill.step_loop import StepLoop
from mmcompress.distill.step_plan import StepPlan
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.kinds.base import Models


def distill_models_(
    student: Models, inputs: TrainingInputs, *, options: TrainingOptions
) -> list[dict[str, float]]:
    """Train pruned models in place.

    The learning rate follows the schedule of the settings. The loss on validation pairs is taken at
    the start and a few times after it. When it was clearly lower before the end, the weights of
    that time are kept.

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
    loop = StepLoop(student, inputs, options=options)
    if settings.schedule == "until_converged" and loop.best.validations:
        train_until_converged_(loop)
    else:
        _train_by_cosine_(loop)
    loop.complete_curve()
    if loop.state.share < 1:
        loop.save_checkpoint(is_due=True)
        return loop.state.curve
    loop.best.restore_()
    loop.write_history()
    return loop.state.curve


def _train_by_cosine_(loop: StepLoop) -> None:
    """Train while the rate falls by a cosine over all steps.

    The steps are those of the settings, or as many as the minutes afford.
    """
    options = loop.options
    settings = options.settings
    state = loop.state
    best = loop.best
    plan = StepPlan(
        asked_steps=state.asked_steps,
        max_seconds=loop.max_seconds,
        planned_steps=state.planned_steps,
        is_checked=state.is_plan_checked,
    )
    while state.share < 1:
        if state.share >= options.stop_share:
            return
        best.validate(state.share, state.step)
        if settings.patience and best.unimproved_validations >= settings.patience:
            break
        loop.advance_(schedule_rate(state.rate, state.step, share=state.share))
        if plan.is_due(state.step):
            plan.lay_out(
                state.step,
                elapsed=state.elapsed,
                pace=loop.measure_pace(),
                reserved=best.estimate_seconds_left(),
            )
            state.planned_steps = plan.planned_steps
            state.is_plan_checked = plan.is_checked
            _tell_plan(plan, loop)
        state.share = plan.compute_share(state.step, elapsed=state.elapsed)
        loop.report(state.share)
        loop.save_checkpoint()
    state.share = 1.0
    best.validate(1.0, state.step)


def _tell_plan(plan: StepPlan, loop: StepLoop) -> None:
    """Tell the user how many steps the training will have, if its minutes afford fewer."""
    if 0 < plan.planned_steps < plan.asked_steps:
        loop.options.progress(
            f"a step takes {loop.state.step_seconds:.2f} s: {plan.planned_steps} of "
            f"{plan.asked_steps} steps fit into {plan.max_seconds / 60:.3g} minutes "
            "(distill.minutes)",
            None,
        )
