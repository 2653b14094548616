"""The number of steps of a training, and its schedule."""

import json
import math

import pytest
import torch

from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill.step_plan import (
    StepPlan,
    TrainingPace,
    choose_step_count,
    predict_loss_of_twice_the_steps,
)
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.prune.surgery import copy_without_units
from mmcompress.spec.schema import Distill


@pytest.mark.parametrize(
    ("loss_ratio", "steps"),
    [
        (1.0, 100),
        (1.02, 250),
        (1.1, 500),
        (1.49, 500),
        (1.5, 1000),
        (7.9, 1000),
        (8.0, 3000),
        (math.inf, 3000),
    ],
)
def test_auto_goes_by_the_loss_before_training(loss_ratio, steps):
    if math.isinf(loss_ratio):
        loss_ratio = 1e9
    assert choose_step_count(Distill(), loss_ratio=loss_ratio, share=1.0) == steps
    quick = Distill(auto_steps_factor=0.25)
    assert choose_step_count(quick, loss_ratio=loss_ratio, share=1.0) == round(steps / 4)


def test_a_number_of_steps_is_taken_as_it_is():
    assert choose_step_count(Distill(steps=7), loss_ratio=9.0, share=1.0) == 7
    assert choose_step_count(Distill(steps=300), loss_ratio=None, share=0.1) == 30
    assert choose_step_count(Distill(), loss_ratio=None, share=0.1) == 100


def test_twice_the_steps_lower_the_excess_loss_alone():
    assert predict_loss_of_twice_the_steps(0.3, dense_loss=0.1) == pytest.approx(
        0.1 + 0.2 * 0.6156, rel=1e-3
    )
    assert predict_loss_of_twice_the_steps(0.1, dense_loss=0.1) == pytest.approx(0.1)


def lay_out(plan, step, *, elapsed, step_seconds, reserved=0.0, teacher_seconds=0.0, passes=1):
    """Lay out a plan where the teacher knows nothing yet, when its pace is known."""

    def count_new_draws(planned_steps):
        return max(-(-planned_steps // passes) - step, 0)

    if plan.is_due(step):
        pace = TrainingPace(
            step_seconds=step_seconds,
            teacher_seconds=teacher_seconds,
            count_new_draws=count_new_draws,
        )
        plan.lay_out(step, elapsed=elapsed, pace=pace, reserved=reserved)


def test_the_pace_decides_once_and_nothing_is_cut_in_mid_course():
    plan = StepPlan(asked_steps=1000, max_seconds=60.0)
    lay_out(plan, 19, elapsed=10.0, step_seconds=0.5)
    assert plan.planned_steps == 0
    lay_out(plan, 20, elapsed=10.0, step_seconds=0.5, reserved=5.0)
    assert plan.planned_steps == 20 + 90
    # After a tenth of the steps it is laid once more: something else had made the first ones slow.
    lay_out(plan, 21, elapsed=10.0, step_seconds=0.25, reserved=5.0)
    assert plan.planned_steps == 21 + 180
    # The machine becomes slow: the number stays, and the schedule ends with its last step.
    lay_out(plan, 60, elapsed=300.0, step_seconds=5.0)
    assert plan.planned_steps == 201
    assert plan.compute_share(67, elapsed=1e6) == pytest.approx(1 / 3)


def test_what_fits_into_the_time_has_all_its_steps():
    plan = StepPlan(asked_steps=100, max_seconds=60.0)
    lay_out(plan, 10, elapsed=1.0, step_seconds=0.1)
    assert plan.planned_steps == 100
    none_left = StepPlan(asked_steps=100, max_seconds=60.0)
    lay_out(none_left, 10, elapsed=70.0, step_seconds=7.0)
    assert none_left.planned_steps == 10


def test_steps_on_known_pairs_cost_no_teacher():
    """Of 1 s a new step, the teacher takes .6 s. In three passes two steps of three cost .4 s."""
    fresh = StepPlan(asked_steps=1000, max_seconds=120.0)
    lay_out(fresh, 20, elapsed=20.0, step_seconds=0.4, teacher_seconds=0.6)
    assert fresh.planned_steps == 20 + 100
    repeated = StepPlan(asked_steps=1000, max_seconds=120.0)
    lay_out(repeated, 20, elapsed=20.0, step_seconds=0.4, teacher_seconds=0.6, passes=3)
    # .4 * (199 - 20) + .6 * (67 - 20) = 99.8
    assert repeated.planned_steps == 199


class SteppedClock:
    """A clock on which every step of a training takes two seconds."""

    def __init__(self):
        self.seconds = 0.0

    def read_seconds(self):
        return self.seconds

    def wait_a_step(self):
        self.seconds += 2.0


class SlowTeacher(Teacher):
    """A teacher that takes four seconds for a draw that it does not know."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.clock = SteppedClock()

    def __call__(self, batch):
        if self.can_store(batch.draw):
            self.clock.seconds += 4.0
        return super().__call__(batch)


@pytest.mark.slow
def test_the_plan_counts_on_what_the_teacher_knows_already(spec, pipeline, models, tmp_path):
    """A second training of the same pairs affords more steps: it has no teacher to wait for."""
    store = TeacherStore(folder=tmp_path / "store", max_bytes=1e9)
    teacher = SlowTeacher(pipeline, models, store=store)
    planned = []
    for _ in range(2):
        options = TrainingOptions(
            settings=Distill(
                steps=100, minutes=2, batch=2, validations=0, find_learning_rate=False
            ),
            history=tmp_path / "history.json",
            clock=teacher.clock,
            hold_weights_=teacher.clock.wait_a_step,
        )
        inputs = TrainingInputs(pipeline=pipeline, teacher=teacher, data=open_dataset(spec.data))
        student = {name: copy_without_units(model, {}) for name, model in models.items()}
        distill_models_(student, inputs, options=options)
        planned.append(json.loads((tmp_path / "history.json").read_text())[0]["planned_steps"])
    # First 20 steps of 6 s. Then 20 steps of 2 s, and 13 of 6 s: 118 of 120 s.
    assert planned == [20, 33]
    assert teacher.clock.seconds == 120 + 118


@pytest.mark.slow
def test_a_training_says_how_many_steps_its_minutes_afford(spec, pipeline, models, tmp_path):
    kept = {
        name: {block.name: torch.arange(0, block.units, 2) for block in model.blocks}
        for name, model in models.items()
    }
    student = {name: copy_without_units(model, kept[name]) for name, model in models.items()}
    clock = SteppedClock()
    messages = []
    options = TrainingOptions(
        settings=Distill(steps=100, minutes=1, batch=4, validations=0),
        progress=lambda message, share: messages.append(message),
        history=tmp_path / "history.json",
        clock=clock,
        hold_weights_=clock.wait_a_step,
    )
    inputs = TrainingInputs(
        pipeline=pipeline, teacher=Teacher(pipeline, models), data=open_dataset(spec.data)
    )
    distill_models_(student, inputs, options=options)
    first_row, *rows = json.loads((tmp_path / "history.json").read_text())
    assert first_row["asked_steps"] == 100
    assert first_row["planned_steps"] == 30
    assert rows[-1]["step"] == 30
    assert any("30 of 100 steps fit into 1 minutes" in message for message in messages)
