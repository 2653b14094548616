"""Faults on a Ray cluster of several nodes on this machine: what goes on by itself, what resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
from small_cluster import by_value
from small_search import go

from mmcompress.errors import ClusterError
from mmcompress.search import study
from mmcompress.search.cluster_nodes import EXPECTED_VARIABLE, list_versions
from mmcompress.search.executors import ExecutorSettings, WorkerDied
from mmcompress.search.ray_executor import RayExecutor, _pass_on
from mmcompress.spec.schema import Cluster, RuntimeEnv, TaskResources


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


def eat_memory_on_a_whole_node(folder, candidate):
    """Take memory for some candidates until there is no more: 256 MB from where the worker is."""
    import resource

    if candidate["kept_units"]["b"]["0"] == 64:
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + 256 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (room, hard_limit))
        eaten = []
        try:
            while True:
                eaten.append(bytearray(32 * 2**20))
        finally:
            eaten.clear()
            resource.setrlimit(resource.RLIMIT_AS, (hard_limit, hard_limit))
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
def test_a_trial_that_takes_all_memory_is_recorded_and_the_search_goes_on(
    tmp_path, start_cluster, make_executor
):
    executor = make_executor(start_cluster({"num_cpus": 2}), None)
    trials = go(
        tmp_path / "j",
        by_value(eat_memory_on_a_whole_node),
        trials=12,
        mutations=2,
        workers=2,
        retries=1,
        executor=executor,
    )
    check_journal(tmp_path / "j", trials)
    failed = [t for t in study.open_study(tmp_path / "j").trials if "error" in t.user_attrs]
    assert failed and trials
    for trial in failed:
        assert "MemoryError" in trial.user_attrs["error"] or "died" in trial.user_attrs["error"]


@pytest.mark.very_slow
@pytest.mark.timeout(300)
def test_a_node_without_memory_is_refused_by_its_name(start_cluster, make_executor):
    """Ray takes the memory for full at any use, so it ends whatever works there."""
    one = start_cluster({"num_cpus": 1}, memory_usage_threshold=0.0, memory_monitor_refresh_ms=100)
    with pytest.raises(ClusterError) as refused:
        make_executor(one, None)
    for node in one.nodes:
        assert f"node {node.node_id[:8]} (127.0.0.1) has no memory left" in str(refused.value)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OutOfMemoryError("..."), "Ray ended the worker process, since the memory of its node ran"),
        (NodeDiedError("..."), "the node of the worker was lost"),
        (WorkerCrashedError(), "the worker process ended (killed, or out of memory)"),
    ],
)
def test_the_end_of_a_worker_is_told_by_its_reason(error, told):
    answer, future = Future(), Future()
    answer.set_exception(error)
    _pass_on(future, answer, evaluate=take_a_moment, start=0.0)
    with pytest.raises(WorkerDied, match=re.escape(told)):
        future.result()


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
