"""Whole runs on Ray, by their command: what they do when the cluster dies under them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from followed_run import check_end, find_processes_of, start_command, wait_for_trials
from small_redis import serve_redis

from mmcompress.results.records import Summary
from mmcompress.run.run_targets import run
from mmcompress.search import study
from mmcompress.storage import read_record

pytestmark = [pytest.mark.very_slow, pytest.mark.timeout(900)]

AWAY_SECONDS = 3
"""Seconds between the death of a head and its return."""

TRIALS = ("--set", "search.executor=ray", "--set", "search.trials=30")


def check_resume_line(process, *, out):
    """Let a run whose Ray is gone end, and check its last word; returns its finished trials."""
    _, told = process.communicate(timeout=180)
    assert process.returncode == 1, told[-2000:]
    last_line = told.strip().splitlines()[-1]
    assert "nothing that was finished is lost; go on with: mmcompress run" in last_line
    assert last_line.endswith("--resume")
    return study.read_finished_trials(study.open_study(out / "study.journal"))


def test_a_run_whose_cluster_loses_its_head_says_how_to_go_on_and_does(
    tiny, tmp_path, start_cluster
):
    first = start_cluster({"num_cpus": 2})
    out = tmp_path / "r"
    words = ["run", tiny / "spec.yaml", "--out", out, *TRIALS]
    process = start_command(*words, "--ray-address", first.cluster.address)
    wait_for_trials(out, 3, process=process)
    first.lose_head()
    finished = check_resume_line(process, out=out)
    assert len(finished) >= 3
    second = start_cluster({"num_cpus": 2})
    resumed = start_command(*words, "--ray-address", second.cluster.address, "--resume")
    check_end(resumed, out=out, before=finished)


def test_a_head_that_keeps_its_state_in_redis_comes_back_and_the_run_goes_on(
    tiny, tmp_path, start_cluster, monkeypatch
):
    (tmp_path / "redis").mkdir()
    with serve_redis(tmp_path / "redis") as address:
        monkeypatch.setenv("RAY_REDIS_ADDRESS", address)
        one = start_cluster({"num_cpus": 2})
        out = tmp_path / "r"
        words = ["run", tiny / "spec.yaml", "--out", out, *TRIALS]
        process = start_command(*words, "--ray-address", one.cluster.address)
        before = wait_for_trials(out, 3, process=process)
        one.lose_head()
        time.sleep(AWAY_SECONDS)
        one.restart_head()
        summary = check_end(process, out=out, before=before)
        assert len(summary.trials) > len(before)  # work was left when the head came back
        one.cluster.shutdown()


def test_a_run_whose_own_raylet_dies_says_how_to_go_on_and_does(tiny, tmp_path):
    """A local Ray has one raylet, and the run hangs on it."""
    out = tmp_path / "r"
    words = ["run", tiny / "spec.yaml", "--out", out, *TRIALS, "--workers", "2"]
    process = start_command(*words)
    wait_for_trials(out, 3, process=process)
    children = psutil.Process(process.pid).children(recursive=True)
    raylets = [child for child in children if child.name() == "raylet"]
    assert len(raylets) == 1
    raylets[0].kill()
    finished = check_resume_line(process, out=out)
    assert len(finished) >= 3
    check_end(start_command(*words, "--resume"), out=out, before=finished)


def test_the_same_submit_goes_on_with_a_run_whose_whole_cluster_was_lost(
    tiny, tmp_path, start_cluster, monkeypatch
):
    # A job calls `python`: the one that runs this test.
    python_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{python_folder}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "r"
    words = ["submit", tiny / "spec.yaml", "--out", out, "--set", "search.trials=30"]
    first = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    followed = start_command(*words, "--address", first.job_address)
    wait_for_trials(out, 3, process=followed)
    # The process of the run is on the head, and is lost with it.
    for process in find_processes_of(out, but=followed):
        process.kill()
    first.cluster.shutdown()
    _, told = followed.communicate(timeout=180)
    assert followed.returncode == 1, told[-2000:]
    assert "it goes on with the run on another one" in told
    finished = study.read_finished_trials(study.open_study(out / "study.journal"))
    assert len(finished) >= 3
    second = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    again = start_command(*words, "--address", second.job_address)
    check_end(again, out=out, before=finished)


def test_a_deterministic_run_is_the_same_on_a_cluster_of_two_nodes(
    tiny, tmp_path, machine, start_cluster
):
    settings = {"search.deterministic": True, "search.trials": 6, "search.batch": 3}
    run(
        tiny / "spec.yaml",
        tmp_path / "here",
        overrides={**settings, "search.executor": "inline"},
        **machine,
    )
    one = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    on_cluster = {"search.executor": "ray", "search.ray_address": one.cluster.address}
    run(
        tiny / "spec.yaml",
        tmp_path / "there",
        overrides={**settings, **on_cluster, "search.workers": 2},
        **machine,
    )
    here, there = (read_record(Summary, tmp_path / n / "summary.json") for n in ("here", "there"))
    assert there.kept_units == here.kept_units
    for one_trial, other in zip(here.trials, there.trials, strict=True):
        assert other.overrides == one_trial.overrides and other.candidate == one_trial.candidate
        assert other.loss == pytest.approx(one_trial.loss, abs=1e-6)
    assert {trial.worker.partition("/")[0] for trial in there.trials} <= {
        node.node_id[:8] for node in one.nodes
    }
