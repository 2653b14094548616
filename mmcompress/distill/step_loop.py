"""A training under way: it does steps, and keeps the books, the history and the checkpoint."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch

from mmcompress.distill.best_weights import BestWeights
from mmcompress.distill.checkpoint import TrainingState
from mmcompress.distill.learning_rate import (
    RATE_SEARCH_SHARE,
    choose_learning_rate,
)
from mmcompress.distill.pair_plan import count_distinct_draws
from mmcompress.distill.step_plan import TrainingPace, choose_step_count
from mmcompress.distill.training import Training, TrainingInputs, TrainingOptions
from mmcompress.distill.worker_group import StepRequest
from mmcompress.errors import DiskFull
from mmcompress.kinds.base import Models
from mmcompress.storage import to_plain, write_record

CURVE_STEPS = 5
"""Steps between two rows of the loss curve."""

TIMED_DRAWS = 3
"""Draws that the teacher is timed on."""

MIN_STEP_SHARE = 0.1
"""Least share of a step that is not the teacher's, should its few timed draws have been slow."""


class StepLoop:
    """A training with its optimizer and its state. The schedules ask it for steps."""

    def __init__(self, student: Models, inputs: TrainingInputs, *, options: TrainingOptions):
        """Begin a training, or put the state of its last checkpoint back in place.

        Args:
            student: The models to train, by node.
            inputs: The pipeline, the teacher and the data.
            options: The settings of the spec, and where to report, record and resume.
        """
        torch.manual_seed(options.seed)
        for model in student.values():
            # What is trained is what is deployed: no dropout, batch norms keep their statistics.
            model.eval()
        settings = options.settings
        self.options = options
        self.training = Training(student, inputs, options=options)
        self.optimizer = self.training.make_optimizer()
        self.best = BestWeights(student, inputs, count=settings.validations, clock=options.clock)
        self.max_seconds = settings.minutes * options.budget_share * 60
        self._losses: dict[str, float] = {}
        self._step_times: list[tuple[float, bool]] = []
        """Seconds of each step in this process, and whether its draw was new to the teacher."""
        self._start = options.clock.read_seconds()
        state = self._resume_()
        if state is None:
            state = self._begin()
        else:
            self._start -= state.elapsed
        self.state = state

    def advance_(self, rate: float) -> None:
        """Do one step at a learning rate."""
        state = self.state
        clock = self.options.clock
        is_new = self.training.is_new_draw(state.step)
        step_start = clock.read_seconds()
        batch = self.training.begin_step(
            StepRequest(
                step=state.step - state.first_draw,
                distinct_draws=self._count_distinct_draws(state.planned_steps),
                first_draw=state.first_draw,
            )
        )
        self._losses = self.training.advance_(self.optimizer, batch, rate=rate)
        state.step += 1
        now = clock.read_seconds()
        state.elapsed = now - self._start
        state.note_step_seconds(now - step_start)
        if state.step > 1:
            # The first step allocates memory.
            self._step_times.append((now - step_start, is_new))

    def report(self, share: float) -> None:
        """Add a row to the loss curve and tell the user, every few steps.

        Args:
            share: Share of the schedule that is done, 0 .. 1 or a little more.
        """
        state = self.state
        if state.step % CURVE_STEPS == 1:
            state.curve.append(self._make_curve_row())
            loss = state.curve[-1]["loss"]
            self.options.progress(f"step {state.step}, loss {loss:.3f}", min(share, 1.0))

    def complete_curve(self) -> None:
        """Add the last step to the loss curve, if it is not there."""
        curve = self.state.curve
        if self._losses and (not curve or curve[-1]["step"] != self.state.step):
            curve.append(self._make_curve_row())

    def save_checkpoint(self, *, is_due: bool = False) -> None:
        """Save the state of the training, when it is time to."""
        checkpoint = self.options.checkpoint
        state = self.state
        if checkpoint is None or not (is_due or checkpoint.is_due(state.elapsed)):
            return
        state.validations = self.best.validations
        state.unimproved_validations = self.best.unimproved_validations
        try:
            checkpoint.save(
                state,
                self.training.weights,
                optimizer=self.optimizer,
                best_weights=self.best.weights,
            )
        except DiskFull as error:
            checkpoint.last_saved_at = state.elapsed
            self.options.progress(
                f"{error}; the training goes on, and an interruption would cost what came after "
                "the last checkpoint",
                None,
            )

    def write_history(self) -> None:
        """Write the losses of training and validation, where a file is asked for."""
        options = self.options
        state = self.state
        if options.history is None:
            return
        first_row = {
            "step": 0,
            "rate": state.rate,
            "product_bits": float(torch.finfo(self.training.product_type).bits),
            "asked_steps": state.asked_steps,
            "planned_steps": state.planned_steps or state.asked_steps,
            "seconds": state.elapsed,
            "patience": float(options.settings.patience),
            "is_open_ended": float(options.settings.schedule == "until_converged"),
            "has_converged": float(state.has_converged),
        }
        rows = [first_row, *state.curve, *self.best.validations]
        try:
            write_record(options.history, to_plain(rows))
        except DiskFull as error:
            # The trained weights are worth more, and are written next.
            options.progress(f"{error}; the losses of the training are not kept", None)

    def measure_pace(self) -> TrainingPace:
        """Measure what a step costs, on pairs that the teacher knows and on new ones.

        The teacher answers the first new draws for it. It would be asked them anyway.
        """
        state = self.state
        training = self.training
        if not training.repeats_draws:
            return TrainingPace(step_seconds=self._find_usual_seconds(0.0))
        new_draws: list[int] = []
        for step in range(state.step, state.asked_steps):
            if training.is_new_draw(step):
                new_draws.append(step)
        teacher_seconds = self._time_teacher(new_draws[:TIMED_DRAWS])
        known_seconds = self._find_usual_seconds(teacher_seconds)

        def count_new_draws(planned_steps: int) -> int:
            last_draw = state.first_draw + self._count_distinct_draws(planned_steps)
            return bisect_left(new_draws, min(last_draw, planned_steps))

        return TrainingPace(
            step_seconds=known_seconds,
            teacher_seconds=teacher_seconds,
            count_new_draws=count_new_draws,
        )

    def _find_usual_seconds(self, teacher_seconds: float) -> float:
        """Return the median seconds of the steps so far, without the teacher on new draws.

        Args:
            teacher_seconds: What it takes for a new draw.
        """
        seconds: list[float] = []
        for step_seconds, is_new in self._step_times:
            own_seconds = step_seconds - teacher_seconds * is_new
            seconds.append(max(own_seconds, MIN_STEP_SHARE * step_seconds))
        return statistics.median(seconds) if seconds else self.state.step_seconds

    def _time_teacher(self, draws: Sequence[int]) -> float:
        """Return the median seconds that the teacher takes for some draws; 0 without any."""
        clock = self.options.clock
        seconds: list[float] = []
        for draw in draws:
            if not self.training.is_new_draw(draw):
                # There is no more room, so what it answers now would be lost.
                break
            batch = self.training.draw_batch(draw)
            start = clock.read_seconds()
            self.training.inputs.teacher(batch)
            seconds.append(clock.read_seconds() - start)
        return statistics.median(seconds) if seconds else 0.0

    def _count_distinct_draws(self, planned_steps: int) -> int:
        """Count the draws after which pairs come again; 0 until the steps are known."""
        if not planned_steps:
            return 0
        steps = planned_steps - self.state.first_draw
        return count_distinct_draws(steps, self.options.settings.max_passes)

    def _begin(self) -> TrainingState:
        """Take the loss before training, and choose the number of steps and the learning rate."""
        options = self.options
        settings = options.settings
        best = self.best
        best.validate(0.0, 0)
        if self.training.compares_blocks:
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
        # The steps of a trial are few: the leader of a group does them alone.
        alone = Training(
            self.training.student, self.training.inputs, options=replace(options, group=None)
        )
        state.rate = choose_learning_rate(
            alone,
            steps=state.asked_steps,
            loss_ratio=loss_ratio,
            deadline=self._start + RATE_SEARCH_SHARE * self.max_seconds,
        )
        if settings.find_learning_rate:
            options.progress(f"the learning rate is {state.rate:.2g}", 0.0)
        return state

    def _resume_(self) -> TrainingState | None:
        """Put the last checkpoint back in place; returns its state, None when there is none."""
        checkpoint = self.options.checkpoint
        if checkpoint is None:
            return None
        saved = checkpoint.load_(self.training.weights, self.optimizer)
        if saved is None:
            return None
        state, self.best.weights = saved
        self.best.validations = state.validations
        self.best.unimproved_validations = state.unimproved_validations
        return state

    def _make_curve_row(self) -> dict[str, float]:
        """Return a row of the loss curve: the step, the loss, and its parts."""
        loss = sum(self._losses.values())
        return {"step": self.state.step, "loss": loss, **self._losses}
