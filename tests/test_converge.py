"""Training in rounds of twice the steps, each ended by a run-down of the learning rate."""

import json
from dataclasses import replace

import pytest
import torch

from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.converge import NO_RUN_DOWN, run_down_rate
from mmcompress.distill.learning_rate import WARMUP_STEPS
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.prune.surgery import copy_without_units
from mmcompress.run.training_history import read_training_result
from mmcompress.spec.schema import Distill
from mmcompress.workspace.folder import RunFolder

SECONDS_PER_STEP = 2.0


class SteppedClock:
    """A clock on which every step of a training takes two seconds, and nothing else any time."""

    def __init__(self):
        self.seconds = 0.0

    def now(self):
        return self.seconds

    def wait_a_step(self):
        self.seconds += SECONDS_PER_STEP


class ScriptedPipeline:
    """A pipeline whose loss on validation pairs is written down beforehand."""

    def __init__(self, pipeline, losses):
        self._pipeline = pipeline
        self._losses = iter(losses)

    def loss_of_models(self, models, batch, *, dense=None):
        return next(self._losses)

    def __getattr__(self, name):
        return getattr(self._pipeline, name)


@pytest.fixture()
def student(models):
    kept = {
        name: {block.name: torch.arange(0, block.units, 2) for block in model.blocks}
        for name, model in models.items()
    }
    return lambda: {name: copy_without_units(model, kept[name]) for name, model in models.items()}


@pytest.fixture()
def train(spec, pipeline, models, batch, student, tmp_path):
    """Train with losses on validation pairs: the dense one, that before training, the others."""

    def train_scripted(losses, *, minutes):
        scripted = ScriptedPipeline(pipeline, losses)
        clock = SteppedClock()
        options = TrainingOptions(
            settings=Distill(
                steps=10,
                minutes=minutes,
                batch=4,
                schedule="until_converged",
                find_learning_rate=False,
                precision="fp32",
            ),
            history=RunFolder(tmp_path).training_history,
            clock=clock,
            hold_weights_=clock.wait_a_step,
        )
        inputs = TrainingInputs(
            pipeline=scripted,
            teacher=Teacher(scripted, models),
            data=open_dataset(spec.data),
            validation=batch,
        )
        distill_models_(student(), inputs, options=options)
        rows = json.loads(RunFolder(tmp_path).training_history.read_text())
        steps = [row["step"] for row in rows if "validation_loss" in row and "restored" not in row]
        return steps, read_training_result(RunFolder(tmp_path)), clock.seconds / SECONDS_PER_STEP

    return train_scripted


def test_the_rate_is_constant_and_then_run_down_to_zero():
    assert run_down_rate(1.0, 0, first=NO_RUN_DOWN, steps=100) == 1 / WARMUP_STEPS
    assert run_down_rate(1.0, 70, first=NO_RUN_DOWN, steps=100) == 1.0
    run_down = [run_down_rate(1.0, step, first=80, steps=100) for step in range(80, 101)]
    assert run_down[0] == 1.0 and run_down[-1] == 0.0
    assert run_down == sorted(run_down, reverse=True)


def test_the_steps_are_doubled_as_long_as_that_helps(train):
    steps, result, done = train([0.1, 9.0, 4.0, 2.0, 1.9], minutes=60)
    assert steps == [0, 10, 20, 40]
    assert result.ended_by == "convergence" and "more steps no longer help" in result.describe()
    # Every round goes on from before the run-down of the one before.
    assert done == 10 + (20 - 8) + (40 - 16)


def test_the_minutes_end_it_and_the_last_round_is_fitted_into_them(train):
    steps, result, done = train([0.1, 9.0, 4.0, 2.0, 1.0, 0.5], minutes=1)
    # 30 steps: the second round ends after 22 of them, and the 8 that are left are no round.
    assert steps == [0, 10, 20] and done == 22
    assert result.ended_by == "minutes"
    steps, _, done = train([0.1, 9.0, 4.0, 2.0, 1.0, 0.5], minutes=1.4)
    assert done == 42 and steps == [0, 10, 20, 36]


def test_of_two_rounds_the_better_weights_are_kept(train):
    steps, result, _ = train([0.1, 9.0, 1.0, 3.0], minutes=60)
    assert steps == [0, 10, 20]
    assert result.loss == 1.0


class Killed(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("last_message", ["step 6,", "step 16,", "10 steps with"])
def test_it_goes_on_from_any_point(spec, pipeline, models, batch, student, tmp_path, last_message):
    inputs = TrainingInputs(
        pipeline=pipeline,
        teacher=Teacher(pipeline, models),
        data=open_dataset(spec.data),
        validation=batch,
    )
    settings = Distill(
        steps=10,
        minutes=60,
        batch=4,
        learning_rate=2e-3,
        schedule="until_converged",
        precision="fp32",
    )

    def kill(message, share):
        if message.startswith(last_message):
            raise Killed

    def train_whole(trained, *, progress, name):
        clock = SteppedClock()
        options = TrainingOptions(
            settings=replace(settings, minutes=0.8),
            progress=progress,
            clock=clock,
            hold_weights_=clock.wait_a_step,
            checkpoint=Checkpoint(path=tmp_path / name, interval_seconds=0.0),
        )
        distill_models_(trained, inputs, options=options)
        return trained

    whole = train_whole(student(), progress=lambda message, share: None, name="whole.safetensors")
    with pytest.raises(Killed):
        train_whole(student(), progress=kill, name="cut.safetensors")
    resumed = train_whole(student(), progress=lambda message, share: None, name="cut.safetensors")
    for node_name in models:
        pairs = zip(whole[node_name].parameters(), resumed[node_name].parameters(), strict=True)
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)
    assert not list(tmp_path.glob("*before-run-down*"))
