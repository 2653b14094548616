"""Training until more steps no longer help (`distill.schedule: until_converged`).

The learning rate stays constant and is run down over the last fifth of the steps. The loss after a
run-down tells what the steps so far are worth. More training goes on from the weights before the
run-down, up to twice the steps. It ends where a doubling lowers the loss by less than a tenth.
(Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations")
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.learning_rate import warm_up_rate
from mmcompress.distill.step_loop import StepLoop
from mmcompress.errors import DiskFull

RUN_DOWN_SHARE = 0.2
"""Share of the steps over which the learning rate is run down."""

CONVERGED_LOSS_RATIO = 0.9
"""Loss after a run-down / that after half the steps, above which the training has converged."""

MIN_STEPS_RATIO = 1.25
"""Steps of a round / those of the round before, below which no further round is begun."""

NO_RUN_DOWN = -1
"""Stands for the first step of a run-down that has not begun."""


def run_down_rate(highest: float, step: int, *, first: int, steps: int) -> float:
    """Return the learning rate of a step: a warm-up, a constant, and 1 - sqrt in the run-down.

    Args:
        highest: The constant rate.
        step: Steps that are done.
        first: The step that the run-down begins with; `NO_RUN_DOWN` before it.
        steps: The steps at its end.
    """
    rate = warm_up_rate(highest, step)
    if first == NO_RUN_DOWN:
        return rate
    # The first step of a run-down is lower already, and its last one still moves the weights.
    share = (step - first + 1) / (steps - first + 1)
    return rate * (1 - math.sqrt(min(max(share, 0.0), 1.0)))


def train_until_converged_(loop: StepLoop) -> None:
    """Train in rounds of twice the steps until they no longer help, or the minutes are over.

    Args:
        loop: The training. It has validation pairs.
    """
    state = loop.state
    if not state.planned_steps:
        state.planned_steps = state.asked_steps
    with _open_snapshot(loop) as snapshot:
        while state.share < 1:
            _train_round_(loop, snapshot)
            loop.best.measure_loss(state.step)
            loss = loop.best.validations[-1]["validation_loss"]
            loop.options.progress(
                f"{state.step} steps with the rate run down: loss {loss:.3f}", state.share
            )
            earlier_loss = state.run_down_losses[-1] if state.run_down_losses else math.inf
            state.run_down_losses.append(loss)
            state.has_converged = loss > CONVERGED_LOSS_RATIO * earlier_loss
            next_steps = _plan_next_round(loop)
            is_over = state.has_converged or next_steps < MIN_STEPS_RATIO * state.planned_steps
            if is_over or not snapshot.path.exists():
                state.share = 1.0
                loop.save_checkpoint(is_due=True)
                break
            _go_back_(loop, snapshot)
            state.planned_steps = next_steps
            loop.save_checkpoint(is_due=True)


def _train_round_(loop: StepLoop, snapshot: Checkpoint) -> None:
    """Train at the constant rate, keep the weights, and run the rate down."""
    state = loop.state
    while state.step < state.planned_steps:
        if state.run_down_start == NO_RUN_DOWN:
            state.planned_steps = min(state.planned_steps, _count_affordable_steps(loop))
            run_down_steps = round(RUN_DOWN_SHARE * state.planned_steps)
            if state.step >= state.planned_steps - run_down_steps:
                _save_snapshot(loop, snapshot)
                state.run_down_start = state.step
        rate = run_down_rate(
            state.rate, state.step, first=state.run_down_start, steps=state.planned_steps
        )
        loop.advance_(rate)
        used_share = max(state.elapsed / loop.max_seconds, 0.0)
        state.share = min(used_share, 0.999)
        loop.report(state.share)
        loop.save_checkpoint()


def _save_snapshot(loop: StepLoop, snapshot: Checkpoint) -> None:
    """Keep the weights before a run-down. On a full disk, this round is the last one."""
    weights = loop.training.weights
    try:
        snapshot.save(loop.state, weights, optimizer=loop.optimizer, best_weights=())
    except DiskFull as error:
        # That of an earlier round would lead back too far.
        snapshot.path.unlink(missing_ok=True)
        loop.options.progress(f"{error}; the training ends with this round", None)


def _count_affordable_steps(loop: StepLoop) -> int:
    """Count the steps that the minutes afford in all, at the pace so far."""
    state = loop.state
    if state.step < 2 or state.step_seconds <= 0:
        return state.planned_steps
    seconds_left = max(loop.max_seconds - state.elapsed, 0.0)
    return max(state.step + int(seconds_left / state.step_seconds), state.step + 1)


def _plan_next_round(loop: StepLoop) -> int:
    """Return the steps at the end of the next round: twice as many, or what the minutes afford."""
    state = loop.state
    seconds_left = max(loop.max_seconds - state.elapsed, 0.0)
    affordable = 2 * state.planned_steps
    if state.step_seconds > 0:
        affordable = state.run_down_start + int(seconds_left / state.step_seconds)
    return min(2 * state.planned_steps, affordable)


def _go_back_(loop: StepLoop, snapshot: Checkpoint) -> None:
    """Go back to the weights before the run-down; the books go on."""
    loaded = snapshot.load_(loop.training.weights, loop.optimizer)
    assert loaded, "the snapshot was just there"
    earlier_state, _ = loaded
    loop.state.step = earlier_state.step
    # What the run-down saw is not seen by the weights that training goes on from.
    loop.state.first_draw = earlier_state.step
    loop.state.run_down_start = NO_RUN_DOWN


@contextmanager
def _open_snapshot(loop: StepLoop) -> Iterator[Checkpoint]:
    """Give a place for the weights before the run-down, beside the checkpoint where there is one.

    It is removed at the end.
    """
    if loop.options.checkpoint is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Checkpoint(path=Path(folder) / "snapshot.safetensors", interval_seconds=0.0)
        return
    path = loop.options.checkpoint.path
    snapshot = path.with_name(f"{path.stem}.before-run-down{path.suffix}")
    yield Checkpoint(path=snapshot, interval_seconds=0.0)
    snapshot.unlink(missing_ok=True)
