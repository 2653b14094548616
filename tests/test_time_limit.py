"""A trial that hangs is a failed trial: the search goes on."""

from __future__ import annotations

import time
from dataclasses import replace

import deadly_trials
import pytest
from deadly_trials import evaluate_units
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
from small_search import go

from mmcompress.search import study
from mmcompress.search.executors import (
    InlineExecutor,
    TrialTimeout,
    WorkerDied,
    make_process_executor,
)
from mmcompress.search.ray_executor import RayExecutor, _explain_ended_worker
from mmcompress.search.time_limit import limit_seconds


def hang_on_few_units(context, candidate):
    """Hang where half of the units of a node are gone."""
    if sum(candidate["kept_units"]["a"].values()) < 96:
        time.sleep(60)
    return evaluate_units(context, candidate)


@pytest.mark.slow
def test_a_hanging_trial_is_recorded_and_the_search_goes_on(tmp_path):
    start = time.monotonic()
    evaluate = limit_seconds(hang_on_few_units, 0.2)
    with make_process_executor(None, 1) as executor:
        trials = go(tmp_path / "j", evaluate, trials=8, mutations=0, retries=2, executor=executor)
    assert time.monotonic() - start < 50 and trials
    book = study.open_study(tmp_path / "j")
    errors = [t.user_attrs["error"] for t in book.trials if "error" in t.user_attrs]
    assert errors and set(errors) == {
        "TrialTimeout: it took more than 0.2 s (search.trial_seconds)"
    }
    # Not tried again: each hung once.
    assert len({str(t.params) for t in book.trials if "error" in t.user_attrs}) == len(errors)


def test_the_process_of_the_driver_is_never_interrupted(tmp_path):
    evaluate = limit_seconds(
        lambda context, candidate: time.sleep(0.3) or evaluate_units(context, candidate), 0.1
    )
    assert (
        len(go(tmp_path / "j", evaluate, trials=2, mutations=0, executor=InlineExecutor(None))) == 2
    )


def list_errors(journal):
    """Return the errors of the failed trials in a journal."""
    book = study.open_study(journal)
    return [t.user_attrs["error"] for t in book.trials if "error" in t.user_attrs]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.examples(1)
def test_a_killed_worker_costs_its_trial_and_another_takes_its_place(tmp_path, workers):
    messages = []
    with make_process_executor(str(tmp_path), workers) as executor:
        trials = go(
            tmp_path / "j",
            deadly_trials.die_once,
            trials=5,
            mutations=0,
            workers=workers,
            executor=executor,
            progress=lambda message, share: messages.append(message),
        )
    assert len(trials) >= 3
    [error] = list_errors(tmp_path / "j")
    assert error.startswith("WorkerDied: the worker process ended after")
    [told] = [message for message in messages if "a trial failed" in message]
    assert "another one was started" in told


def test_a_trial_whose_worker_was_killed_is_tried_again(tmp_path):
    with make_process_executor(str(tmp_path), 1) as executor:
        go(
            tmp_path / "j",
            deadly_trials.die_once,
            trials=2,
            mutations=0,
            retries=1,
            executor=executor,
        )
    assert list_errors(tmp_path / "j") == []


@pytest.mark.slow
def test_a_trial_inside_a_library_ends_with_its_worker_and_the_search_goes_on(tmp_path):
    evaluate = replace(limit_seconds(deadly_trials.hang_once, 0.2), grace_seconds=0.3)
    start = time.monotonic()
    with make_process_executor(str(tmp_path), 1) as executor:
        trials = go(tmp_path / "j", evaluate, trials=4, mutations=0, retries=2, executor=executor)
    assert time.monotonic() - start < 60 and len(trials) >= 2
    [error] = list_errors(tmp_path / "j")
    assert error.startswith("TrialTimeout: it took more than 0.2 s (search.trial_seconds)")
    assert "another one was started" in error


@pytest.mark.very_slow
def test_a_killed_worker_of_ray_costs_its_trial(tmp_path):
    def die_once(folder, candidate):  # workers can't import a test module
        import os
        import signal
        from pathlib import Path

        mark = Path(folder) / "began"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        lost = sum(64 - units for units in candidate["kept_units"]["a"].values())
        return {"loss": float(lost), "quality": {}, "seconds": 0.0}

    messages = []
    executor = RayExecutor(str(tmp_path), 2)
    try:
        trials = go(
            tmp_path / "j",
            die_once,
            trials=5,
            mutations=0,
            workers=2,
            executor=executor,
            progress=lambda message, share: messages.append(message),
        )
    finally:
        executor.shutdown()
    assert len(trials) >= 3
    [error] = list_errors(tmp_path / "j")
    assert error.startswith("WorkerDied: the worker process ended")
    assert any("a trial failed, the search goes on: WorkerDied" in one for one in messages)


@pytest.mark.very_slow
def test_a_trial_that_hangs_under_ray_is_a_timeout_and_is_not_tried_again(tmp_path):
    def hang_once(folder, candidate):  # workers can't import a test module
        import signal
        import time
        from pathlib import Path

        mark = Path(folder) / "began"
        if not mark.exists():
            mark.touch()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(600)
        lost = sum(64 - units for units in candidate["kept_units"]["a"].values())
        return {"loss": float(lost), "quality": {}, "seconds": 0.0}

    evaluate = replace(limit_seconds(hang_once, 3.0), grace_seconds=0.5)
    messages = []
    executor = RayExecutor(str(tmp_path), 2)
    try:
        trials = go(
            tmp_path / "j",
            evaluate,
            trials=5,
            mutations=0,
            retries=2,
            workers=2,
            executor=executor,
            progress=lambda message, share: messages.append(message),
        )
    finally:
        executor.shutdown()
    assert len(trials) >= 3
    [error] = list_errors(tmp_path / "j")
    assert error.startswith("TrialTimeout: it took more than 3 s (search.trial_seconds)")
    assert any("a trial failed, the search goes on: TrialTimeout" in one for one in messages)


def test_ray_tells_a_lost_machine_and_an_early_end_from_a_timeout():
    def explain(error, seconds, limit=10.0):
        evaluate = replace(limit_seconds(hang_on_few_units, limit), grace_seconds=2.0)
        return type(_explain_ended_worker(error, evaluate=evaluate, seconds=seconds))

    crash = WorkerCrashedError()
    assert explain(crash, 12.1) is TrialTimeout
    assert explain(crash, 11.9) is WorkerDied
    assert explain(crash, 10_000, limit=3000.0) is TrialTimeout
    assert explain(OutOfMemoryError("memory"), 12.1) is WorkerDied
    assert explain(NodeDiedError("gone"), 12.1) is WorkerDied
    unlimited = _explain_ended_worker(crash, evaluate=hang_on_few_units, seconds=1e6)
    assert type(unlimited) is WorkerDied
