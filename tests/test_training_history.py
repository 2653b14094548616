"""What the summary says of the trainings of an artifact."""

import json

import pytest

from mmcompress.run.training_history import count_trained_steps, read_training_result
from mmcompress.workspace.folder import RunFolder


def write_history(path, *, steps, planned, asked, loss=0.3):
    settings = {
        "step": 0,
        "rate": 1e-3,
        "bf16": 0.0,
        "asked_steps": asked,
        "planned_steps": planned,
        "seconds": 30.0,
    }
    rows = [settings, {"step": 1, "loss": 9.0}, {"step": steps, "loss": 1.0}]
    rows += [{"step": steps, "validation_loss": loss, "dense": 0.1}]
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("steps", "planned", "asked", "ended_by"),
    [(100, 100, 100, "steps"), (40, 40, 100, "minutes"), (25, 40, 100, "patience")],
)
def test_what_ended_a_training_is_told(tmp_path, steps, planned, asked, ended_by):
    folder = RunFolder(path=tmp_path)
    write_history(folder.training_history, steps=steps, planned=planned, asked=asked)
    result = read_training_result(folder)
    assert (result.steps, result.asked_steps, result.ended_by) == (steps, asked, ended_by)
    assert result.loss_of_twice_the_steps == pytest.approx(0.1 + 0.2 * 2**-0.7)
    assert f"{steps} of {asked} steps" in result.describe()
    assert "Twice the steps are expected to bring 0.223" in result.describe()


def test_rounds_count_together_and_an_earlier_artifact_does_not(tmp_path):
    folder = RunFolder(path=tmp_path)
    assert read_training_result(folder) is None
    write_history(folder.round_history(0), steps=500, planned=500, asked=500)
    write_history(folder.round_history(1), steps=10, planned=10, asked=10)
    write_history(folder.training_history, steps=20, planned=20, asked=20, loss=0.2)
    result = read_training_result(folder)
    assert (result.steps, result.asked_steps, result.seconds) == (30, 30, 60.0)
    assert result.loss == 0.2
    assert count_trained_steps(folder) == 530
