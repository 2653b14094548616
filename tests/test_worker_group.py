"""Several processes train as one does on the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

TESTS = Path(__file__).parent


NOBODY = -1
"""In place of the rank of a process: none."""


def train(spec, folder, count, losses, scarce_rank=NOBODY):
    """Train in some processes; returns the loss of every step, and the weights."""
    folder.mkdir()
    out = folder / "losses.json"
    processes = []
    for rank in range(count):
        words = [spec, rank, count, folder / "meeting", out, json.dumps(losses), scarce_rank]
        command = [sys.executable, "group_process.py", *map(str, words)]
        processes.append(subprocess.Popen(command, cwd=TESTS, stderr=subprocess.PIPE))
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told.decode()[-3000:]
    return json.loads(out.read_text()), load_file(out.with_suffix(".safetensors"))


@pytest.mark.parametrize("losses", [{}, {"hidden": 1.0, "cross": 1.0}], ids=["usual", "blocks"])
@pytest.mark.very_slow
def test_two_processes_train_as_one_does(tiny, tmp_path, losses):
    """Shares of 4 and 5 pairs: the losses of 50 steps, those that compare pairs included."""
    alone, alone_weights = train(tiny / "spec.yaml", tmp_path / "one", 1, losses)
    together, weights = train(tiny / "spec.yaml", tmp_path / "two", 2, losses)
    assert len(alone) == len(together) == 50
    assert alone[-1] < alone[0]
    if losses:
        # What blocks add is compared share by share, and shares count alike.
        assert together == pytest.approx(alone, rel=0.02)
        return
    assert together == pytest.approx(alone, rel=1e-3)
    for name, weight in alone_weights.items():
        assert (weights[name] - weight).abs().max() < 1e-3, name


@pytest.mark.parametrize(("scarce_rank", "part_count"), [(0, 2), (1, 4)])
@pytest.mark.very_slow
def test_all_processes_halve_their_shares_where_the_memory_of_one_runs_out(
    tiny, tmp_path, scarce_rank, part_count
):
    """Shares of 4 and 5 pairs become smaller parts: a mean over pairs stays what it is.

    Losses that compare pairs, and means over the tokens of texts, are left out. The loss of a step
    tells the gradients of all steps before.
    """
    losses = dict.fromkeys(("contrast", "affinity", "logits", "caption"), 0.0)
    whole, _ = train(tiny / "spec.yaml", tmp_path / "whole", 2, losses)
    parts, _ = train(tiny / "spec.yaml", tmp_path / "parts", 2, losses, scarce_rank)
    assert parts == pytest.approx(whole, rel=1e-3)
    told = (tmp_path / "parts" / "losses.txt").read_text()
    assert f"in {part_count} parts" in told
    assert f"in {2 * part_count} parts" not in told


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore:`use_push_based_shuffle` is deprecated:DeprecationWarning")
def test_no_other_ray_of_the_machine_is_asked_whether_workers_should_live():
    """Ray's cleaner asks the dashboard at the usual port, whichever Ray it is of."""
    from mmcompress.run.compress.train_on_ray import (
        OMITTED_CALLBACK,
        TorchTrainer,
        TrainerOfOneCluster,
    )

    def list_callbacks(trainer_type):
        callbacks = trainer_type(lambda: None)._create_default_callbacks()
        return [type(each).__name__ for each in callbacks]

    usual = list_callbacks(TorchTrainer)
    assert OMITTED_CALLBACK in usual
    usual.remove(OMITTED_CALLBACK)
    assert list_callbacks(TrainerOfOneCluster) == usual
