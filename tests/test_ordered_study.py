"""A deterministic search: the same for any number of workers, and wherever it is cut off."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from deadly_trials import evaluate_units
from killed_search import search
from small_search import go_in_order

from mmcompress.errors import SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import SAMPLERS
from mmcompress.results.records import LEVEL_SWITCH_ORIGIN, Summary
from mmcompress.run.run_targets import run
from mmcompress.search import study
from mmcompress.spec.deterministic import leave_out_clocks
from mmcompress.storage import read_record

TESTS = Path(__file__).parent


def describe(trials):
    """Return what must be the same, in the order of the proposals."""
    ordered = sorted(trials, key=lambda trial: trial.number)
    return [
        (t.number, t.origin, t.overrides, t.candidate.make_key(), t.loss, t.latency_ms)
        for t in ordered
    ]


def count_lines(file):
    """Count the lines of a file that need not be there."""
    return len(file.read_text().splitlines()) if file.exists() else 0


def mark_dear_samplers():
    """Return every sampler; that of Gaussian processes takes a quarter of a second a proposal."""
    marks = {"gp": [pytest.mark.very_slow]}
    return [pytest.param(name, marks=marks.get(name, [])) for name in SAMPLERS.list_names()]


class ShuffledExecutor(ThreadPoolExecutor):
    """Workers that take a moment each, drawn by lot: what began first need not end first."""

    def __init__(self, workers, seed):
        super().__init__(workers)
        self.dice = random.Random(seed)

    def submit(self, evaluate, *args):
        seconds = self.dice.random() / 50

        def wait_and_evaluate():
            time.sleep(seconds)
            return {**evaluate(None, *args), "worker": "here/1"}

        return super().submit(wait_and_evaluate)


class InterruptedExecutor:
    """An executor whose driver is stopped at one of its submissions."""

    def __init__(self, submissions):
        self.left = submissions
        self.keys = []

    def submit(self, evaluate, candidate):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.keys.append(json.dumps(candidate, sort_keys=True))
        future: Future = Future()
        future.set_result({**evaluate(None, candidate), "worker": "here/1"})
        return future


@pytest.mark.parametrize("sampler", mark_dear_samplers())
@pytest.mark.examples(2)
def test_any_number_of_workers_gives_the_same_trials(tmp_path, sampler):
    alone = go_in_order(tmp_path / "1", sampler=sampler)
    assert {t.origin for t in alone} == {"knapsack", "sampler", LEVEL_SWITCH_ORIGIN}
    for workers in (2, 4):
        with ShuffledExecutor(workers, workers) as executor:
            trials = go_in_order(tmp_path / str(workers), executor=executor, sampler=sampler)
        assert describe(trials) == describe(alone)


@pytest.mark.examples(2)
@pytest.mark.parametrize("submissions", [0, 1, 3, 4, 6, 9, 14])
def test_wherever_it_is_cut_off_it_goes_on_to_the_same_trials(tmp_path, submissions):
    whole = go_in_order(tmp_path / "whole")
    first = InterruptedExecutor(submissions)
    with pytest.raises(KeyboardInterrupt):
        go_in_order(tmp_path / "cut", executor=first)
    second = InterruptedExecutor(-1)
    assert describe(go_in_order(tmp_path / "cut", executor=second)) == describe(whole)
    # What a driver has heard of is not asked for again: all but those of the batch it died in.
    written = study.read_finished_trials(study.open_study(tmp_path / "cut"))
    assert len({t.candidate.make_key() for t in written}) == len(written) == len(whole)
    assert len(first.keys) + len(second.keys) <= len(whole) + 3


def test_a_candidate_that_breaks_breaks_once(tmp_path):
    asked = []

    def break_some(context, candidate):
        asked.append(json.dumps(candidate, sort_keys=True))
        if len(asked) % 3 == 0:
            raise ValueError("this one breaks")
        return evaluate_units(context, candidate)

    first = go_in_order(tmp_path / "j", break_some)
    count = len(asked)
    assert study.count_failures(study.open_study(tmp_path / "j")) == count // 3
    assert describe(go_in_order(tmp_path / "j", break_some)) == describe(first)
    assert len(asked) == count


def test_the_search_for_a_second_artifact_knows_the_first_and_is_replayed_too(tmp_path):
    for folder in ("whole", "cut"):
        first = go_in_order(tmp_path / folder)
    whole = go_in_order(tmp_path / "whole", artifact=2, trials=20, mutations=10)
    with pytest.raises(KeyboardInterrupt):
        executor = InterruptedExecutor(1)
        go_in_order(tmp_path / "cut", artifact=2, trials=20, mutations=10, executor=executor)
    again = go_in_order(tmp_path / "cut", artifact=2, trials=20, mutations=10)
    assert describe(again) == describe(whole)
    numbers = [trial.number for trial in whole]
    assert len(first) < len(numbers) == len(set(numbers))
    assert study.list_study_faults(tmp_path / "cut") == []


@pytest.mark.very_slow
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_at_random_moments_ends_with_the_same_trials(tmp_path):
    undisturbed = describe(search(tmp_path / "undisturbed", workers=1))
    evaluations = len((tmp_path / "undisturbed.evaluated").read_text().splitlines())
    journal = tmp_path / "killed"
    dice = random.Random(7)
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "killed_search.py", str(journal)], cwd=TESTS)
        evaluated = journal.with_suffix(".evaluated")
        lines_before = count_lines(evaluated)
        while count_lines(evaluated) == lines_before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(dice.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if journal.exists():
            # A line may be torn. No trial is left running, or stands there twice.
            faults = study.list_study_faults(journal)
            assert all(fault.endswith("is damaged") for fault in faults), faults
    assert describe(search(journal)) == undisturbed
    assert study.list_study_faults(journal) == []
    lines = evaluated.read_text().splitlines()
    # A kill costs what was on the four workers and had not been written.
    assert len(set(lines)) == evaluations and len(lines) <= evaluations + 20 * 4


@pytest.mark.very_slow
@pytest.mark.timeout(900)
def test_a_whole_run_is_the_same_for_one_two_and_four_workers(tiny, tmp_path, machine):
    found = {}
    changes = {"search.deterministic": True, "search.trials": 6, "search.batch": 3}
    for workers in (1, 2, 4):
        # One process, processes, and Ray.
        executor = {1: "inline", 2: "process", 4: "ray"}[workers]
        overrides = {**changes, "search.executor": executor, "search.workers": workers}
        run(tiny / "spec.yaml", tmp_path / str(workers), overrides=overrides, **machine)
        found[workers] = read_record(Summary, tmp_path / str(workers) / "summary.json")
    for workers in (2, 4):
        assert found[workers].kept_units == found[1].kept_units
        assert len(found[workers].trials) == len(found[1].trials)
        for other, one in zip(found[workers].trials, found[1].trials, strict=True):
            assert other.overrides == one.overrides and other.candidate == one.candidate
            assert other.loss == pytest.approx(one.loss, abs=1e-6)


def test_nothing_depends_on_the_clock(tiny, tmp_path):
    spec = load_spec(
        tiny / "spec.yaml", {"search.deterministic": True, "compute.precision": "auto"}
    )
    settled = leave_out_clocks(spec)
    assert settled.distill.minutes == 100_000 and settled.compute.precision == "fp32"
    assert leave_out_clocks(load_spec(tiny / "spec.yaml")) == load_spec(tiny / "spec.yaml")
    with pytest.raises(SpecError, match="--max-time ends stages by the clock"):
        run(
            tiny / "spec.yaml",
            tmp_path / "r",
            max_time="1h",
            overrides={"search.deterministic": True},
        )
