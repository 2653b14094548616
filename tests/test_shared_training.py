"""A training on several workers of Ray goes on when one of them is lost, or the run itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from small_s3 import serve_s3

from mmcompress.workspace.folder import RunFolder

pytestmark = [pytest.mark.very_slow, pytest.mark.timeout(600)]

TESTS = Path(__file__).parent
STEPS = 200


def start(spec, out, *options):
    command = [sys.executable, "shared_training.py", str(spec), str(out), str(STEPS), *options]
    return subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True)


# Ray lists a checkpoint here once it is whole.
WHOLE_CHECKPOINTS = "training/checkpoint_manager_snapshot.json"


def read_until_checkpoint(process, is_written):
    """Read lines until a step is told after a checkpoint was written."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step") and is_written():
            return
    raise AssertionError("".join(lines))


def read_to_the_end(process):
    lines = list(process.stdout)
    process.stdout.close()
    assert process.wait(timeout=120) == 0, "".join(lines)
    return "".join(lines)


def find_training_workers(process):
    """Return the processes of the two workers."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        if any("RayTrainWorker" in word for word in child.cmdline()):
            found.append(child)
    return found


def list_steps(lines):
    return [int(step) for step in re.findall(r"^step (\d+),", lines, re.MULTILINE)]


def check_history(out):
    """Every step is in the curve once, and the loss fell."""
    rows = json.loads(RunFolder(path=out).training_history.read_text())
    curve = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in curve]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    assert curve[-1]["loss"] < curve[0]["loss"]


def lose_machine(process):
    """Kill a run and all that runs for it: a worker outlives its driver by seconds."""
    lost = [*psutil.Process(process.pid).children(recursive=True), process]
    for each in lost:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(lost[:-1], timeout=60)
    process.wait(timeout=60)
    process.stdout.close()


def test_a_worker_that_is_lost_is_replaced(tiny, tmp_path):
    out = tmp_path / "run"
    process = start(tiny / "spec.yaml", out)
    read_until_checkpoint(process, (RunFolder(path=out).shared_training / WHOLE_CHECKPOINTS).exists)
    workers = find_training_workers(process)
    assert len(workers) == 2
    workers[-1].kill()
    told = read_to_the_end(process)
    # Not from the start: from the last checkpoint.
    assert min(list_steps(told)) > 1 and f"trained {STEPS} steps" in told
    check_history(out)


def test_a_node_that_is_lost_is_replaced_by_one_that_comes(tiny, tmp_path, start_cluster):
    """Each node has a worker. Of what the training hangs on, nothing lies on the lost one."""
    one = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    out = tmp_path / "run"
    process = start(tiny / "spec.yaml", out, "--ray-address", one.cluster.address)
    read_until_checkpoint(process, (RunFolder(path=out).shared_training / WHOLE_CHECKPOINTS).exists)
    one.lose_node(one.nodes[1])
    one.add_node(num_cpus=1)
    told = read_to_the_end(process)
    assert min(list_steps(told)) > 1 and f"trained {STEPS} steps" in told
    check_history(out)


def test_a_run_that_is_killed_goes_on_from_the_last_checkpoint(tiny, tmp_path):
    out = tmp_path / "run"
    process = start(tiny / "spec.yaml", out)
    read_until_checkpoint(process, (RunFolder(path=out).shared_training / WHOLE_CHECKPOINTS).exists)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    told = read_to_the_end(start(tiny / "spec.yaml", out))
    assert min(list_steps(told)) > 1 and f"trained {STEPS} steps" in told
    check_history(out)


def test_a_run_whose_machine_is_lost_goes_on_from_the_checkpoint_at_its_url(tiny, tmp_path):
    """Another machine has nothing of the first one but the storage."""
    with serve_s3("runs") as client:

        def is_written():
            found = client.list_objects_v2(Bucket="runs").get("Contents", ())
            return any(entry["Key"].endswith(WHOLE_CHECKPOINTS) for entry in found)

        url = "s3://runs/shared"
        process = start(tiny / "spec.yaml", tmp_path / "one", "--url", url)
        read_until_checkpoint(process, is_written)
        lose_machine(process)
        shutil.rmtree(tmp_path / "one")
        told = read_to_the_end(start(tiny / "spec.yaml", tmp_path / "other", "--url", url))
    assert min(list_steps(told)) > 1 and f"trained {STEPS} steps" in told
    check_history(tmp_path / "other")
