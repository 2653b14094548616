"""Faults on a Ray cluster of several nodes on this machine: what goes on by itself, what resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from small_cluster import by_value
from small_redis import serve_redis
from small_search import go

from mmcompress.errors import ClusterError
from mmcompress.results.records import Summary
from mmcompress.search import study
from mmcompress.search.cluster_nodes import EXPECTED_VARIABLE, list_versions
from mmcompress.search.executors import ExecutorSettings
from mmcompress.search.ray_executor import RayExecutor
from mmcompress.spec.schema import Cluster, RuntimeEnv, TaskResources
from mmcompress.storage import read_record

AWAY_SECONDS = 3
"""Seconds between the death of a head and its return."""


@pytest.fixture()
def make_executor():
    """`make_executor(cluster, context, **options)`: an executor that lets the cluster go."""
    made = []

    def make(one, context, workers=2, **options):
        settings = ExecutorSettings(address=one.cluster.address, **options)
        made.append(RayExecutor(context, workers, settings))
        return made[-1]

    yield make
    for executor in made:
        executor.shutdown()


def take_a_moment(folder, candidate):
    """Evaluate in .3 s, and leave the process's number in the folder."""
    import os
    import time

    (Path(folder) / str(os.getpid())).touch()
    time.sleep(0.3)
    lost = sum(64 - units for units in candidate["kept_units"]["a"].values())
    return {"loss": float(lost), "quality": {}, "seconds": 0.3}


def crash_on_a_whole_node(folder, candidate):
    """Raise for some candidates, always the same ones, and leave a file at every try."""
    import hashlib
    import uuid

    if candidate["kept_units"]["b"]["0"] == 64:
        key = hashlib.sha256(repr(candidate).encode()).hexdigest()
        (Path(folder) / f"{key}-{uuid.uuid4().hex}").touch()
        raise RuntimeError("this structure always crashes")
    lost = sum(64 - units for units in candidate["kept_units"]["a"].values())
    return {"loss": float(lost), "quality": {}, "seconds": 0.0}


def check_journal(path, trials):
    """Every finished trial stands in the journal once, with its constraint; none is running."""
    assert study.list_study_faults(path) == []
    written = study.read_finished_trials(study.open_study(path))
    keys = Counter(trial.candidate.make_key() for trial in written)
    assert set(keys.values()) == {1}
    assert set(keys) == {trial.candidate.make_key() for trial in trials}


@pytest.mark.very_slow
@pytest.mark.timeout(300)
def test_every_worker_is_killed_once_and_no_trial_is_lost(tmp_path, start_cluster, make_executor):
    executor = make_executor(start_cluster({"num_cpus": 2}), str(tmp_path))
    killed = []
    is_over = threading.Event()

    def kill_each_worker_once():
        while not is_over.wait(0.05):
            for mark in tmp_path.iterdir():
                if mark.name.isdigit() and mark.name not in killed and len(killed) < 4:
                    killed.append(mark.name)
                    os.kill(int(mark.name), signal.SIGKILL)

    killer = threading.Thread(target=kill_each_worker_once)
    killer.start()
    try:
        trials = go(
            tmp_path / "j",
            by_value(take_a_moment),
            trials=10,
            mutations=2,
            workers=2,
            retries=4,
            executor=executor,
        )
    finally:
        is_over.set()
        killer.join()
    assert len(killed) == 4 and len(trials) >= 10
    assert study.count_failures(study.open_study(tmp_path / "j")) == 0
    check_journal(tmp_path / "j", trials)


@pytest.mark.very_slow
@pytest.mark.timeout(300)
def test_a_node_is_lost_and_another_one_gets_work(tmp_path, start_cluster, make_executor):
    one = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    executor = make_executor(one, str(tmp_path))
    evaluated = []

    def exchange_node(message, share):
        evaluated.append(message)
        if len(evaluated) == 4:
            one.lose_node(one.nodes[1])
            one.nodes.append(one.add_node(num_cpus=1))

    trials = go(
        tmp_path / "j",
        by_value(take_a_moment),
        trials=40,
        mutations=4,
        workers=2,
        retries=3,
        executor=executor,
        progress=exchange_node,
    )
    check_journal(tmp_path / "j", trials)
    workers = {trial.worker.partition("/")[0] for trial in trials}
    assert one.nodes[2].node_id[:8] in workers and one.nodes[0].node_id[:8] in workers


@pytest.mark.very_slow
@pytest.mark.timeout(300)
def test_a_trial_that_always_crashes_is_tried_thrice_and_recorded(
    tmp_path, start_cluster, make_executor
):
    executor = make_executor(start_cluster({"num_cpus": 2}), str(tmp_path / "tries"))
    (tmp_path / "tries").mkdir()
    trials = go(
        tmp_path / "j",
        by_value(crash_on_a_whole_node),
        trials=12,
        mutations=2,
        workers=2,
        retries=2,
        executor=executor,
    )
    check_journal(tmp_path / "j", trials)
    failed = [t for t in study.open_study(tmp_path / "j").trials if "error" in t.user_attrs]
    assert failed and all("always crashes" in t.user_attrs["error"] for t in failed)
    tries = Counter(path.name.partition("-")[0] for path in (tmp_path / "tries").iterdir())
    assert set(tries.values()) == {3} and len(tries) == len(failed)


@pytest.mark.very_slow
@pytest.mark.timeout(300)
def test_trials_go_where_their_resources_are(tmp_path, start_cluster, make_executor):
    one = start_cluster({"num_cpus": 2}, {"num_cpus": 2, "resources": {"big": 1}, "num_gpus": 1})
    half_gpu = TaskResources(gpu=0.5, memory_gb=0.1, custom={"big": 0.25})
    executor = make_executor(one, str(tmp_path), resources=half_gpu)
    trials = go(tmp_path / "j", by_value(take_a_moment), trials=4, workers=2, executor=executor)
    assert {t.worker.partition("/")[0] for t in trials} == {one.nodes[1].node_id[:8]}
    executor.resources = TaskResources(cpu=64, custom={"none": 1})
    told = executor.explain_wait()
    assert told.startswith("a trial reserves 64 CPU, 1 none, and 0.00 GB of the object store of ")
    assert "GB of object store" in told
    assert "2 CPU, 1 GPU" in told and "1 big" in told


def read_variable(name, candidate):
    """Return an environment variable of the worker as a loss."""
    import os

    return {"loss": float(os.environ[name]), "quality": {}, "seconds": 0.0}


@pytest.mark.very_slow
@pytest.mark.timeout(300)
def test_a_node_with_other_packages_or_without_a_secret_is_refused_by_its_name(
    start_cluster, make_executor, monkeypatch
):
    one = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    monkeypatch.setenv(EXPECTED_VARIABLE, json.dumps({**list_versions(), "torch": "1.0.0"}))
    with pytest.raises(ClusterError) as refused:
        make_executor(one, None)
    for node in one.nodes:
        assert f"node {node.node_id[:8]} (127.0.0.1) has torch" in str(refused.value)
    assert "here it is 1.0.0" in str(refused.value)
    monkeypatch.delenv(EXPECTED_VARIABLE)
    with pytest.raises(ClusterError, match=r"lacks the environment variable NOT_SET_ANYWHERE"):
        make_executor(one, None, cluster=Cluster(secrets=("NOT_SET_ANYWHERE",)))
    prepared = Cluster(runtime_env=RuntimeEnv(env_vars={"LOSS": "2.5"}), secrets=("LOSS",))
    executor = make_executor(one, "LOSS", cluster=prepared)
    assert executor.submit(by_value(read_variable), {}).result(timeout=120)["loss"] == 2.5


def wait_for_stage(folder, stage, *, process, seconds=240):
    """Wait until a run has told of a stage."""
    log = folder / "progress.jsonl"
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        assert process.poll() is None, process.communicate()
        if log.exists():
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.strip()]
            if any(line.get("stage") == stage for line in lines):
                return
        time.sleep(0.2)
    raise AssertionError(f"no stage '{stage}' within {seconds} s")


def wait_for_trials(folder, count, *, process, seconds=240):
    """Wait until so many trials of a run are finished; returns them."""
    journal = folder / "study.journal"
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        assert process.poll() is None, process.communicate()
        if journal.exists():
            finished = study.read_finished_trials(study.open_study(journal))
            if len(finished) >= count:
                return finished
        time.sleep(0.1)
    raise AssertionError(f"no {count} trials within {seconds} s")


@pytest.mark.very_slow
@pytest.mark.timeout(900)
def test_a_run_whose_cluster_loses_its_head_says_how_to_go_on_and_does(
    tiny, tmp_path, start_cluster
):
    first = start_cluster({"num_cpus": 2})
    out = tmp_path / "r"
    command = [sys.executable, "-m", "mmcompress.cli", "run", str(tiny / "spec.yaml")]
    command += ["--out", str(out), "--set", "search.executor=ray"]
    command += ["--set", "search.trials=30"]
    process = subprocess.Popen(
        [*command, "--ray-address", first.cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_trials(out, 3, process=process)
    first.lose_head()
    _, told = process.communicate(timeout=180)
    assert process.returncode == 1, told[-2000:]
    last_line = told.strip().splitlines()[-1]
    assert "nothing that was finished is lost; go on with: mmcompress run" in last_line
    assert last_line.endswith("--resume")
    finished = study.read_finished_trials(study.open_study(out / "study.journal"))
    assert len(finished) >= 3

    second = start_cluster({"num_cpus": 2})
    done = subprocess.run(
        [*command, "--ray-address", second.cluster.address, "--resume"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr[-2000:]
    summary = read_record(Summary, out / "summary.json")
    keys = {trial.candidate.make_key() for trial in summary.trials}
    assert {trial.candidate.make_key() for trial in finished} <= keys
    assert len(keys) == len(summary.trials)
    doctor = [sys.executable, "-m", "mmcompress.cli", "doctor", str(out)]
    assert subprocess.run(doctor, capture_output=True, check=False).returncode == 0


@pytest.mark.very_slow
@pytest.mark.timeout(600)
def test_a_head_that_keeps_its_state_in_redis_comes_back_and_the_run_goes_on(
    tiny, tmp_path, start_cluster, monkeypatch
):
    (tmp_path / "redis").mkdir()
    with serve_redis(tmp_path / "redis") as address:
        monkeypatch.setenv("RAY_REDIS_ADDRESS", address)
        one = start_cluster({"num_cpus": 2})
        out = tmp_path / "r"
        command = [sys.executable, "-m", "mmcompress.cli", "run", str(tiny / "spec.yaml")]
        command += ["--out", str(out), "--set", "search.executor=ray"]
        command += ["--set", "search.trials=30"]
        process = subprocess.Popen(
            [*command, "--ray-address", one.cluster.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        before = wait_for_trials(out, 3, process=process)
        one.lose_head()
        time.sleep(AWAY_SECONDS)
        one.restart_head()
        _, told = process.communicate(timeout=400)
        assert process.returncode in (0, 3), told[-2000:]
        summary = read_record(Summary, out / "summary.json")
        check_journal(out / "study.journal", summary.trials)
        assert len(summary.trials) > len(before)  # work was left when the head came back
        one.cluster.shutdown()
