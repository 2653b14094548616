"""Training in rounds of twice the steps, each ended by a run-down of the learning rate."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill.checkpoint import Checkpoint, TrainingState
from mmcompress.distill.converge import NO_RUN_DOWN, run_down_rate, train_until_converged_
from mmcompress.distill.learning_rate import WARMUP_STEPS
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.errors import DiskFull
from mmcompress.prune.surgery import copy_without_units
from mmcompress.spec.schema import Distill

SECONDS_PER_STEP = 2.0


class SteppedClock:
    """A clock on which every step of a training takes two seconds, and nothing else any time."""

    def __init__(self):
        self.seconds = 0.0

    def read_seconds(self):
        return self.seconds

    def wait_a_step(self):
        self.seconds += SECONDS_PER_STEP


class ScriptedLosses:
    """Losses on validation pairs that are written down beforehand."""

    def __init__(self, losses):
        self._losses = iter(losses)
        self.validations = []

    def measure_loss(self, step):
        self.validations.append({"step": step, "validation_loss": next(self._losses)})


class ScriptedLoop:
    """A training of one weight, which each step raises by one."""

    def __init__(self, losses, *, minutes):
        weight = torch.nn.Parameter(torch.zeros(1))
        self.training = SimpleNamespace(weights=[weight])
        self.optimizer = torch.optim.AdamW([weight])
        self.best = ScriptedLosses(losses)
        self.max_seconds = 60 * minutes
        self.state = TrainingState(rate=1.0, asked_steps=10)
        self.options = SimpleNamespace(checkpoint=None, progress=lambda message, share: None)
        self.rates = []

    def advance_(self, rate):
        with torch.no_grad():
            self.training.weights[0].add_(1.0)
        self.state.step += 1
        self.state.elapsed += SECONDS_PER_STEP
        self.state.step_seconds = SECONDS_PER_STEP
        self.rates.append(rate)

    def report(self, share):
        assert 0 <= share < 1

    def save_checkpoint(self, *, is_due=False):
        pass


def train(losses, *, minutes):
    """Train by a script; return the steps at every validation, and the loop."""
    loop = ScriptedLoop(losses, minutes=minutes)
    train_until_converged_(loop)
    assert loop.state.share == 1.0
    return [row["step"] for row in loop.best.validations], loop


def test_the_rate_is_constant_and_then_run_down_to_zero():
    assert run_down_rate(1.0, 0, first=NO_RUN_DOWN, steps=100) == 1 / WARMUP_STEPS
    assert run_down_rate(1.0, 70, first=NO_RUN_DOWN, steps=100) == 1.0
    run_down = [run_down_rate(1.0, step, first=80, steps=100) for step in range(80, 100)]
    assert run_down[0] < 0.8 and 0 < run_down[-1] < 0.03
    assert run_down == sorted(run_down, reverse=True)


def test_the_steps_are_doubled_as_long_as_that_helps():
    steps, loop = train([4.0, 2.0, 1.9], minutes=60)
    assert steps == [10, 20, 40] and loop.state.has_converged
    # Every round goes on from before the run-down of the one before.
    assert len(loop.rates) == 10 + (20 - 8) + (40 - 16)
    assert loop.training.weights[0].item() == 40
    assert loop.rates[9] < 0.5 < loop.rates[12] == 1.0


def test_the_minutes_end_it_and_the_last_round_is_fitted_into_them():
    # 30 steps: the second round ends after 22 of them, and the 8 that are left are no round.
    steps, loop = train([4.0, 2.0, 1.0, 0.5], minutes=1)
    assert steps == [10, 20] and len(loop.rates) == 22 and not loop.state.has_converged
    steps, loop = train([4.0, 2.0, 1.0, 0.5], minutes=1.4)
    assert steps == [10, 20, 36] and len(loop.rates) == 42
    # Even the first round is cut to what the minutes afford, with its run-down.
    steps, loop = train([4.0, 2.0], minutes=0.2)
    assert steps == [6] and loop.rates[-1] < loop.rates[-2]


def test_a_full_disk_before_a_run_down_ends_the_training_with_its_round(monkeypatch):
    def fail(self, state, weights, *, optimizer, best_weights):
        raise DiskFull("no room")

    monkeypatch.setattr(Checkpoint, "save", fail)
    steps, loop = train([4.0, 2.0, 1.0], minutes=60)
    assert steps == [10] and len(loop.rates) == 10


@pytest.fixture()
def student(models):
    kept = {
        name: {block.name: torch.arange(0, block.units, 2) for block in model.blocks}
        for name, model in models.items()
    }
    return lambda: {name: copy_without_units(model, kept[name]) for name, model in models.items()}


class Killed(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("last_message", ["step 6,", "10 steps with"])
@pytest.mark.very_slow
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
    )

    def kill(message, share):
        if message.startswith(last_message):
            raise Killed

    def train_whole(trained, *, progress, name):
        clock = SteppedClock()
        options = TrainingOptions(
            settings=replace(settings, minutes=0.6),
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
