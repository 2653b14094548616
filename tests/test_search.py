"""The search: within budget, crash-safe, honest about failures."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import aiohttp
import numpy as np
import psutil
import pytest
import yaml
from deadly_trials import evaluate_units
from killed_search import ThreadedExecutor
from ray import cloudpickle
from ray.job_submission import JobStatus
from small_search import (
    BLOCKS,
    KEPT,
    PREDICT,
    SPACE,
    block,
    go,
    problem,
    resolve_in_steps,
)

from mmcompress.errors import ClusterError, SpecError
from mmcompress.graph.blocks import count_units_after
from mmcompress.graph.load_spec import load_document
from mmcompress.graph.structure import Candidate, cut_whole_pipeline
from mmcompress.measure.cost_model.predictor import LinearFit
from mmcompress.registry import SAMPLERS
from mmcompress.results.records import Trial
from mmcompress.search import jobs, sampling, study
from mmcompress.search import repair as moves
from mmcompress.search import split_by_knapsack as splitting
from mmcompress.search.alternative_cuts import list_alternative_cuts
from mmcompress.search.bisection import bisect_share
from mmcompress.search.executors import make_process_executor
from mmcompress.search.knapsack import choose_options_at_total, choose_options_within_budget
from mmcompress.search.neighbors import switch_levels
from mmcompress.search.problem import (
    find_best_trial,
    list_touched_bounds,
    scale_to_budget,
    to_search_point,
)
from mmcompress.search.ray_executor import RayExecutor
from mmcompress.search.samplers import STARTUP_TRIALS
from mmcompress.search.sensitivity.curves import SensitivityCurve, SensitivityTable
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.split_budget import split_budget
from mmcompress.search.trial_writer import MAX_WAITING_TRIALS, TrialWriter
from mmcompress.search.worker import evaluate_candidate
from mmcompress.spec.space import Dimension, Space
from mmcompress.storage import to_plain


def failing(context, candidate):
    if sum(candidate["kept_units"]["a"].values()) < 96:
        raise ValueError("this one breaks")
    return evaluate_units(context, candidate)


def test_prediction_is_the_sum_along_the_pipeline():
    dense = Candidate(kept_units={n: {} for n in BLOCKS}, precision=dict.fromkeys(BLOCKS, "fp32"))
    assert PREDICT(dense) == pytest.approx(0.2 + 2 * (0.1 + 2 * 1.0))
    half = Candidate(
        kept_units={"a": {"0": 0}, "b": {"0": 40}}, precision={"a": "fp32", "b": "int8"}
    )
    assert PREDICT(half) == pytest.approx(
        0.2 + 0.1 + 1.0 + 0.1 + 0.5 * (np.interp(40, (16, 64), (0.25, 1)) + 1.0)
    )


def test_affine_fit_recovers_base_and_scale():
    fit = LinearFit.fit_line([1.0, 2.0, 4.0], [0.5 + 2 * x for x in (1.0, 2.0, 4.0)])
    assert fit.base == pytest.approx(0.5) and fit.scale == pytest.approx(2.0)


def test_proposals_meet_the_budget_as_closely_as_units_allow():
    p = problem()
    for ratio in (0.1, 0.5, 0.9):
        _, c = scale_to_budget(p, {"nodes.a.prune.ffn": ratio, "nodes.b.prune.ffn": ratio / 2})
        assert p.predict(c) <= p.budget_ms


def test_the_search_stays_within_budget_and_prefers_the_cheap_units(tmp_path):
    trials = go(tmp_path / "j")
    top = find_best_trial(trials, 2.5)
    assert top and top.latency_ms <= 2.5
    assert any(t.origin == "mutation" for t in trials)
    assert sum(top.candidate.kept_units["a"].values()) >= sum(
        top.candidate.kept_units["b"].values()
    )


def test_candidates_are_judged_once(tmp_path):
    seen = []

    def count(context, candidate):
        seen.append(str(candidate))
        return evaluate_units(context, candidate)

    go(tmp_path / "j", count)
    assert len(seen) == len(set(seen))


def test_a_failed_trial_is_recorded_and_the_search_goes_on(tmp_path):
    trials = go(tmp_path / "j", failing, trials=14, mutations=0)
    book = study.open_study(tmp_path / "j")
    assert study.count_failures(book) > 0 and len(trials) > 0
    assert any("this one breaks" in t.user_attrs.get("error", "") for t in book.trials)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"seconds": 0.0}, "evaluate_wrongly gives no loss"),
        ({"loss": math.nan}, "the loss is nan"),
    ],
)
def test_an_evaluation_without_a_usable_loss_fails_its_trial_alone(tmp_path, result, message):
    def evaluate_wrongly(context, candidate):
        right = evaluate_units(context, candidate)
        return result if candidate["kept_units"]["a"]["0"] < 32 else right

    trials = go(tmp_path / "j", evaluate_wrongly, trials=14, mutations=4)
    failed = [t for t in study.open_study(tmp_path / "j").trials if "error" in t.user_attrs]
    assert trials and any(message in t.user_attrs["error"] for t in failed)
    # What has failed is not tried again.
    keys = [t.user_attrs["key"] for t in failed]
    assert len(keys) == len(set(keys))


def test_what_is_sent_for_a_trial_is_small():
    """At most 1 MiB besides the weights, for a pipeline of 300 models."""
    kept = {f"n{i}": {f"{k}.ffn": 64 for k in range(24)} for i in range(300)}
    candidate = Candidate(kept_units=kept, precision=dict.fromkeys(kept, "int8"))
    task = (evaluate_candidate, to_plain(candidate))
    assert len(cloudpickle.dumps(task)) < 2**20


def test_a_search_leaves_the_callers_log_of_optuna_as_it_was(tmp_path):
    logger = logging.getLogger("optuna")
    written = []
    listener = logging.Handler()
    listener.emit = written.append
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    try:
        go(tmp_path / "j", evaluate_units, trials=3, mutations=0)
        assert (logger.level, written) == (logging.DEBUG, [])
        study.optuna.create_study()
        assert len(written) == 1  # the caller's own study is told of
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)


def test_retries_are_ours(tmp_path):
    calls = []

    def flaky(context, candidate):
        calls.append(1)
        if len(calls) % 2:
            raise OSError("once")
        return evaluate_units(context, candidate)

    go(tmp_path / "j", flaky, trials=3, mutations=0, retries=1)
    assert study.count_failures(study.open_study(tmp_path / "j")) == 0


def test_every_trial_is_given_back_by_its_overrides(tmp_path):
    seed = Candidate(
        kept_units={"a": {"0": 32}, "b": {"1": 16}}, precision=dict.fromkeys(BLOCKS, "int8")
    )
    trials = go(tmp_path / "j", seeds=[seed])
    assert trials[0].candidate == seed and trials[0].origin == "knapsack"
    for t in trials:
        if t.origin != "sampler":
            blocks = {
                k.split(".prune.blocks.")[1]: v
                for k, v in t.overrides.items()
                if k.startswith("nodes.a.prune.blocks")
            }
            for b in BLOCKS["a"]:
                assert int(
                    count_units_after(b, round(blocks[b.name] * 4))
                ) == t.candidate.kept_units["a"].get(b.name, 64)
        else:
            assert resolve_in_steps(t.overrides) == t.candidate


def test_seeds_that_were_cut_to_one_structure_are_evaluated_once(tmp_path):
    """Three finalists cut to a budget that moved had become one structure, evaluated thrice."""
    seed = Candidate(
        kept_units={"a": {"0": 32}, "b": {"1": 16}}, precision=dict.fromkeys(BLOCKS, "int8")
    )
    trials = go(tmp_path / "j", trials=0, mutations=0, seeds=[seed, seed, seed])
    assert [trial.candidate for trial in trials] == [seed]
    assert len(study.read_finished_trials(study.open_study(tmp_path / "j"))) == 1


class SlowStudy:
    """A study that takes its time to write, and fails at one trial."""

    def __init__(self, failing=-1):
        self.failing = failing
        self.written = []

    def add_trial(self, trial):
        time.sleep(0.002)
        if trial == self.failing:
            raise OSError("the disk is full")
        self.written.append(trial)


@pytest.mark.parametrize("in_thread", [False, True])
def test_all_trials_are_written_in_their_order(in_thread):
    book = SlowStudy()
    with TrialWriter(book, in_thread=in_thread) as writer:
        for number in range(50):
            writer.write(number)
            assert number - len(book.written) <= MAX_WAITING_TRIALS
    assert book.written == list(range(50))


@pytest.mark.parametrize("failing", [3, 49])
def test_a_write_that_fails_in_the_thread_ends_the_search(failing):
    with (
        pytest.raises(OSError, match="the disk is full"),
        TrialWriter(SlowStudy(failing), in_thread=True) as writer,
    ):
        for number in range(50):
            writer.write(number)
    # An error of the block itself is the one that is told.
    with pytest.raises(KeyError), TrialWriter(SlowStudy(0), in_thread=True) as writer:
        writer.write(0)
        raise KeyError("search")


def test_many_workers_write_the_same_trials_as_one(tmp_path):
    def evaluate(context, candidate):
        return {**evaluate_units(context, candidate), "worker": "here/1"}

    with ThreadedExecutor(8) as pool:
        trials = go(tmp_path / "j", evaluate, trials=20, mutations=4, workers=8, executor=pool)
    written = study.read_finished_trials(study.open_study(tmp_path / "j"))
    assert {trial.candidate.make_key() for trial in written} == {
        trial.candidate.make_key() for trial in trials
    }
    assert [trial.number for trial in written] == list(range(len(written)))


def test_going_on_keeps_what_was_finished(tmp_path):
    first = go(tmp_path / "j", trials=5, mutations=0)
    left = study.open_study(tmp_path / "j").ask()  # an earlier version left a trial running
    left.suggest_float("nodes.a.prune.ffn", 0.0, 0.9)
    second = go(tmp_path / "j", trials=9, mutations=0)
    assert {t.candidate.make_key() for t in first} <= {t.candidate.make_key() for t in second}
    states = [t.state.name for t in study.open_study(tmp_path / "j").trials]
    assert "RUNNING" not in states and states.count("FAIL") == 1


def test_a_bound_of_trials_holds_for_all_rounds_together(tmp_path):
    seed = Candidate(kept_units=KEPT, precision=dict.fromkeys(BLOCKS, "int8"))
    first = go(tmp_path / "j", trials=4, mutations=4, max_results=6, seeds=[seed])
    assert len(first) == 6
    # another round asks for more, and going on finds everything done
    assert len(go(tmp_path / "j", trials=9, mutations=9, max_results=6)) == 6
    assert len(go(tmp_path / "j", trials=9, mutations=9, max_results=8)) == 8


def test_a_bound_of_trials_leaves_one_where_nothing_is_within_the_budget(tmp_path):
    units = {n: {b.name: b.units for b in blocks} for n, blocks in BLOCKS.items()}
    whole = Candidate(kept_units=units, precision=dict.fromkeys(BLOCKS, "fp32"))
    assert PREDICT(whole) > problem().budget_ms
    first = go(tmp_path / "j", trials=4, mutations=0, max_results=1, seeds=[whole])
    assert [trial.origin for trial in first] == ["knapsack"]
    second = go(tmp_path / "j", trials=4, mutations=0, max_results=1)
    assert [trial.origin for trial in second] == ["knapsack", "sampler"]
    assert len(go(tmp_path / "j", trials=4, mutations=0, max_results=1)) == 2


def test_a_driver_that_is_killed_leaves_no_trial_running(tmp_path):
    """Only finished trials are written, each at once and with its constraint."""
    seen = []

    def stop_at_the_fourth(context, candidate):
        states = [trial.state.name for trial in study.open_study(tmp_path / "j").trials]
        assert states == ["COMPLETE"] * len(seen)
        seen.append(candidate)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return evaluate_units(context, candidate)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "j", stop_at_the_fourth, trials=9, mutations=0)
    lines = (tmp_path / "j").read_text().splitlines()
    assert len(lines) == 1 + 3  # the study, and a line for each trial
    for trial in study.open_study(tmp_path / "j").trials:
        assert "latency" in trial.constraints and "trial" in trial.user_attrs


def test_a_known_structure_is_written_once(tmp_path):
    """The space is small: the sampler proposes most of it several times."""
    trials = go(tmp_path / "j", trials=40, mutations=0, sampler="random")
    written = study.read_finished_trials(study.open_study(tmp_path / "j"))
    keys = [trial.candidate.make_key() for trial in written]
    assert len(keys) == len(set(keys)) == len(trials)


def test_a_sampler_that_cannot_keep_up_looks_at_fewer_trials(tmp_path):
    go(tmp_path / "j", trials=160, mutations=0, sampler="random")
    trials = study.open_study(tmp_path / "j").get_trials()
    sampler = sampling.Sampling(
        "random",
        seed=0,
        distributions=trials[0].distributions,
        trials=trials * 20,
        starts=[],
    )
    count = lambda: len(sampler._study.get_trials(deepcopy=False))
    before = count()
    assert before > 4 * sampling.MIN_KNOWN_TRIALS
    sampler.ask()
    sampler.keep_up_(60.0)
    assert count() == before + 1
    for _ in range(12):
        sampler.ask()
        sampler.keep_up_(0.0)
    assert sampler._max_trials == sampling.MIN_KNOWN_TRIALS
    assert count() < 2 * sampling.MIN_KNOWN_TRIALS


def test_a_search_tells_what_its_trials_are(tmp_path):
    told = []
    seed = Candidate(kept_units=KEPT, precision=dict.fromkeys(BLOCKS, "int8"))

    def note(message, share):
        told.append(message)

    go(tmp_path / "j", trials=5, mutations=2, seeds=[seed], progress=note)
    assert (
        told[0] == "8 trials: 1 given structure, 5 proposals of the sampler, 2 exchanges of units"
    )
    told.clear()
    go(tmp_path / "j", trials=5, mutations=2, progress=note)
    assert told == []


def test_a_structure_on_a_worker_is_not_given_to_another(tmp_path):
    """Both workers are free at first, and the space is small."""

    def evaluate_slowly(candidate):
        time.sleep(0.02)
        return {**evaluate_units(None, candidate), "worker": "here/1"}

    with ThreadPoolExecutor(4) as pool:
        executor = SimpleNamespace(
            submit=lambda _, candidate: pool.submit(evaluate_slowly, candidate)
        )
        go(tmp_path / "j", trials=30, sampler="random", executor=executor, workers=4)
    written = study.read_finished_trials(study.open_study(tmp_path / "j"))
    keys = [trial.candidate.make_key() for trial in written]
    assert len(keys) == len(set(keys)) > 8


def test_a_sampler_looks_at_a_bounded_number_of_trials(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_TRIALS", 10)
    sizes = []
    ask = sampling.Sampling.ask

    def count(self):
        sizes.append(len(self._study.get_trials(deepcopy=False)))
        return ask(self)

    monkeypatch.setattr(sampling.Sampling, "ask", count)
    trials = go(tmp_path / "j", trials=45, mutations=0, sampler="random")
    assert max(sizes) <= 20 and len(trials) > 12
    first_of_the_next_session = len(sizes)
    go(tmp_path / "j", trials=46, mutations=0, sampler="random")
    assert sizes[first_of_the_next_session] <= 10


def test_optuna_tells_nothing_of_a_start_that_it_knows(tmp_path, caplog):
    starts = [{"nodes.a.prune.ffn": 0.5}] * 2
    go(tmp_path / "j", trials=2, mutations=0, starts=starts)
    assert not [record for record in caplog.records if record.name.startswith("optuna")]


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from deadly_trials import evaluate_units
from killed_search import ThreadedExecutor
from small_search import go
def slow(context, candidate):
    time.sleep(0.25)
    return evaluate_units(context, candidate)
from pathlib import Path
go(Path({path!r}), slow, trials=40, mutations=0)
"""


@pytest.mark.slow
def test_a_killed_driver_loses_no_finished_trial(tmp_path):
    path = tmp_path / "j"
    code = SLOW.format(tests=os.path.dirname(__file__), path=str(path))
    driver = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and (
            not path.exists() or path.read_text().count('"trial"') < 3
        ):
            time.sleep(0.1)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    import shutil

    shutil.copy(path, tmp_path / "before")
    before = {
        t.candidate.make_key()
        for t in study.read_finished_trials(study.open_study(tmp_path / "before"))
    }
    after_kill = go(path, trials=12, mutations=0)
    assert len(before) >= 3 and before <= {t.candidate.make_key() for t in after_kill}


def test_knapsack_is_optimal_within_its_grid():
    rng = np.random.default_rng(0)
    costs = [np.array([0.0, 1.0, 2.0, 3.0])] * 4
    damages = [np.sort(rng.random(4))[::-1] for _ in range(4)]
    picked = choose_options_within_budget(costs, damages, budget=6.05)
    mine = sum(d[i] for d, i in zip(damages, picked, strict=True))
    options = itertools.product(range(4), repeat=4)
    assert mine == pytest.approx(
        min(sum(d[i] for d, i in zip(damages, o, strict=True)) for o in options if sum(o) <= 6)
    )
    assert choose_options_within_budget(costs, damages, budget=-1.0) is None
    assert choose_options_within_budget([np.array([5.0])], [np.array([0.0])], budget=1.0) is None


def test_knapsack_is_optimal_at_an_exact_total():
    rng = np.random.default_rng(1)
    sizes = [np.arange(4)] * 3
    losses = [rng.random(4) for _ in sizes]
    for total in range(10):
        options = choose_options_at_total(sizes, losses, total=total)
        assert sum(options) == total
        loss = sum(group[i] for group, i in zip(losses, options, strict=True))
        choices = [c for c in itertools.product(range(4), repeat=3) if sum(c) == total]
        least = min(sum(g[i] for g, i in zip(losses, c, strict=True)) for c in choices)
        assert loss == pytest.approx(least)


def test_bisection_encloses_the_smallest_share_that_is_enough():
    tried = []

    def is_enough(share):
        tried.append(share)
        return share >= 0.3

    low, high = bisect_share(is_enough, low=0.0, high=1.0, steps=10)
    assert low < 0.3 <= high and high - low == 2**-10 and len(tried) == 10
    assert bisect_share(lambda share: False, low=0.0, high=1.0, steps=3)[1] == 1.0


def test_a_uniform_cut_shares_steps_over_all_blocks():
    positions = dataclasses.replace(block("tokens", units=8, step=1), kind="tokens", drop=())
    blocks = {"a": (*BLOCKS["a"], positions), "b": BLOCKS["b"]}
    assert cut_whole_pipeline(blocks, 0.0) == {
        n: {b.name: b.units for b in bs} for n, bs in blocks.items()
    }
    assert cut_whole_pipeline(blocks, 0.5)["a"] == {"0": 32, "1": 32, "tokens": 8}
    assert cut_whole_pipeline(blocks, 0.5, cut_positions=True)["a"]["tokens"] == 4
    # 5 of 16 steps: the remainder goes to the first block alone
    assert cut_whole_pipeline(BLOCKS, 5 / 16) == {"a": {"0": 32, "1": 48}, "b": {"0": 48, "1": 48}}


def test_the_protection_counts_units_by_the_parameters_they_carry():
    p = dataclasses.replace(problem(), cross_modal={"a": ("0",)}, protection=2.0)
    fp32 = dict.fromkeys(BLOCKS, "fp32")
    cut = Candidate(kept_units={"a": {"0": 32}, "b": {"0": 0, "1": 0}}, precision=fp32)
    assert p.compute_removed_shares(cut) == pytest.approx((2 / 3, 1 / 2))
    assert not p.is_allowed(cut)
    assert dataclasses.replace(p, protection=4 / 3).is_allowed(cut)
    assert problem().compute_removed_shares(cut) == (0.0, 0.0)  # nothing is cross-modal


def test_branches_that_run_at_once_share_more_than_the_budget():
    choices = {n: {b.name: (0, 16, 32, 48, 64) for b in bs} for n, bs in BLOCKS.items()}
    curves = {
        n: {b.name: SensitivityCurve(kept_units=(0, 64), loss_increases=(1.0, 0.0)) for b in bs}
        for n, bs in BLOCKS.items()
    }
    sensitivity = Sensitivity(
        scores={},
        grams={},
        curves=curves,
        rounding={n: {"fp32": 0.0} for n in BLOCKS},
        base_loss=0.0,
        fp32_blocks={},
    )
    parallel = dataclasses.replace(PREDICT, reads=dict.fromkeys(BLOCKS, ()))
    kept_units = {}
    for predictor in (PREDICT, parallel):
        p = dataclasses.replace(
            problem(1.5),
            predict=predictor,
            unit_choices=choices,
            precisions=dict.fromkeys(BLOCKS, ("fp32",)),
        )
        splits = split_budget(p, sensitivity, predictor=predictor, budget_ms=1.5)
        assert splits and all(predictor(c) <= 1.5 for c in splits)
        kept_units[predictor is parallel] = sum(
            sum(units.values()) for units in splits[0].kept_units.values()
        )
    assert kept_units[True] > kept_units[False]


def test_the_warm_start_meets_the_budget_and_spares_what_hurts():
    curves = {
        "a": {
            b.name: SensitivityCurve(kept_units=(0, 64), loss_increases=(9.0, 0.0))
            for b in BLOCKS["a"]
        },
        "b": {
            b.name: SensitivityCurve(kept_units=(0, 64), loss_increases=(1.0, 0.0))
            for b in BLOCKS["b"]
        },
    }
    inputs = splitting.SplitInputs(
        blocks=BLOCKS,
        sensitivity=SensitivityTable(curves=curves, rounding={n: {"fp32": 0.0} for n in BLOCKS}),
        cut_weights={},
        unit_choices={n: {b.name: (0, 16, 32, 48, 64) for b in bs} for n, bs in BLOCKS.items()},
        precisions=dict.fromkeys(BLOCKS, ("fp32",)),
        predictor=PREDICT,
    )
    c = splitting.split_by_knapsack(inputs, 2.5)[0].candidate
    assert PREDICT(c) <= 2.5 and sum(c.kept_units["a"].values()) > sum(c.kept_units["b"].values())
    point = to_search_point(problem(), c)
    assert point["nodes.b.prune.ffn"] > point["nodes.a.prune.ffn"]


def test_a_bound_of_the_space_that_a_structure_reaches_is_named():
    def cut(left):
        return Candidate(
            kept_units={"a": {"0": left, "1": left}, "b": {}},
            precision=dict.fromkeys(BLOCKS, "fp32"),
        )

    high = SPACE.dimensions["nodes.a.prune.ffn"].high
    at_bound = round((1 - high) * 64)
    assert list_touched_bounds(problem(), cut(64)) == []
    assert list_touched_bounds(problem(), cut(at_bound)) == [f"nodes.a.prune.ffn ({high:g})"]
    # Where nothing is left to take away, a wider space would not help.
    free = dataclasses.replace(
        SPACE, dimensions={"nodes.a.prune.ffn": Dimension(low=0.0, high=1.0)}
    )
    assert list_touched_bounds(dataclasses.replace(problem(), space=free), cut(0)) == []


def test_a_package_that_a_worker_misses_is_named_here():
    import pickle

    from mmcompress.errors import MissingPackage

    e = MissingPackage("soundfile", "audio")
    for again in (pickle.loads(pickle.dumps(e)), MissingPackage(*e.args)):
        assert str(again) == str(e) and "'soundfile'" in str(e) and "[audio]" in str(e)


@pytest.mark.slow
def test_processes_give_what_inline_gives(tmp_path):
    with make_process_executor(None, 1) as executor:
        one = go(tmp_path / "a", trials=4, mutations=0, executor=executor)
    two = go(tmp_path / "b", trials=4, mutations=0)
    assert {t.candidate.make_key(): t.loss for t in one} == {
        t.candidate.make_key(): t.loss for t in two
    }
    assert all(t.worker for t in one)


def list_open_addresses():
    """What this process and its children listen at, other than the loopback address."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = set()
    for process in processes:
        try:
            connections = process.net_connections("inet")
        except psutil.Error:  # it has ended since
            continue
        listening |= {found.laddr.ip for found in connections if found.status == "LISTEN"}
    assert listening, "Ray listens nowhere"
    return {ip for ip in listening if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")}


@pytest.mark.very_slow
def test_ray_gives_what_inline_gives(tmp_path):
    def by_value(context, candidate):  # workers can't import a test module
        lost = {
            n: sum(64 - k for k in kept.values()) for n, kept in candidate["kept_units"].items()
        }
        return {"loss": 3 * lost["a"] + lost["b"], "quality": {}, "seconds": 0.0}

    handler = signal.getsignal(signal.SIGTERM)
    executor = RayExecutor(None, 2)
    try:
        assert signal.getsignal(signal.SIGTERM) is handler
        one = go(tmp_path / "a", by_value, trials=6, mutations=2, executor=executor, workers=2)
        assert list_open_addresses() == set()
    finally:
        executor.shutdown()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(one) >= 4 and all("/" in t.worker for t in one)
    for t in one:
        assert t.loss == evaluate_units(None, {"kept_units": t.candidate.kept_units})["loss"]


def test_trim_cuts_to_the_budget_where_it_costs_least():
    p = problem(2.5)
    p.unit_choices = {n: {b.name: (0, 16, 32, 48, 64) for b in bs} for n, bs in BLOCKS.items()}
    dense = Candidate(kept_units={n: {} for n in BLOCKS}, precision=dict.fromkeys(BLOCKS, "fp32"))
    cheap = moves.cut_to_budget(
        p, dense, loss_increase=lambda n, b, kept: (9.0 if n == "a" else 1.0) * (64 - kept)
    )
    assert cheap and p.predict(cheap) <= 2.5
    assert sum(cheap.kept_units["b"].values()) < sum(cheap.kept_units["a"].values()) == 128
    assert moves.cut_to_budget(problem(0.1), dense, loss_increase=lambda n, b, kept: 1.0) is None


def test_alternative_cuts_are_distinct_and_each_changes_one_node():
    p = problem(2.5)
    p.unit_choices = {n: {b.name: (0, 16, 32, 48, 64) for b in bs} for n, bs in BLOCKS.items()}
    whole = Candidate(
        kept_units={n: dict.fromkeys(("0", "1"), 64) for n in BLOCKS},
        precision=dict.fromkeys(BLOCKS, "fp32"),
    )
    even = lambda n, b, kept: float(64 - kept) ** 2
    cheapest = moves.cut_to_budget(p, whole, loss_increase=even)
    cuts = list_alternative_cuts(p, whole, loss_increase=even)
    assert cuts[0] == cheapest and len({cut.make_key() for cut in cuts}) == len(cuts) == 3
    assert all(p.predict(cut) <= 2.5 for cut in cuts)
    for cut in cuts[1:]:
        changed = [n for n in BLOCKS if cut.kept_units[n] != whole.kept_units[n]]
        assert len(changed) == 1
    assert list_alternative_cuts(problem(0.1), whole, loss_increase=even) == []


@pytest.mark.parametrize("sampler", SAMPLERS.list_names())
def test_samplers_know_the_space_from_what_others_proposed(tmp_path, sampler):
    from optuna.search_space import IntersectionSearchSpace

    go(
        tmp_path / "j",
        trials=1,
        mutations=2,
        seeds=[Candidate(kept_units=KEPT, precision=dict.fromkeys(BLOCKS, "int8"))],
        sampler=sampler,
    )
    book = study.open_study(tmp_path / "j")
    assert set(IntersectionSearchSpace().calculate(book)) == set(SPACE.dimensions)
    told = [t.params for t in book.trials if t.user_attrs["trial"]["origin"] == "knapsack"]
    assert told == [
        {
            **{f"nodes.{n}.prune.ffn": 0.5 for n in BLOCKS},
            **{f"nodes.{n}.precision": "int8" for n in BLOCKS},
        }
    ]


def test_no_more_blocks_are_dropped_than_the_space_allows():
    p = problem(1.2)
    p.unit_choices, p.max_drops = (
        {n: {b.name: (0, 16, 32, 48, 64) for b in bs} for n, bs in BLOCKS.items()},
        {"a": 1, "b": 0},
    )
    none = Candidate(
        kept_units={n: dict.fromkeys(("0", "1"), 0) for n in BLOCKS},
        precision=dict.fromkeys(BLOCKS, "int8"),
    )
    assert not p.is_allowed(none)
    worth = lambda n, b, kept: (2.0 if b == "1" else 1.0) * (64 - kept)
    alive = moves.restore_dropped(p, none, loss_increase=worth)
    assert alive.kept_units == {"a": {"0": 0, "1": 16}, "b": {"0": 16, "1": 16}} and p.is_allowed(
        alive
    )
    dense = Candidate(kept_units={n: {} for n in BLOCKS}, precision=dict.fromkeys(BLOCKS, "int8"))
    cut = moves.cut_to_budget(p, dense, loss_increase=worth)
    assert cut and p.is_allowed(cut) and p.predict(cut) <= 1.2
    top = Trial(
        number=0,
        origin="s",
        overrides={},
        candidate=alive,
        latency_ms=1.0,
        loss=0.0,
        quality={},
        evaluation_seconds=0.0,
    )
    rng = random.Random(0)
    assert all(
        p.is_allowed(c) for _ in range(40) if (c := switch_levels(p, top, seen_keys=(), rng=rng))
    )


def test_protection_holds_for_moves_and_is_told_to_the_sampler():
    space = Space(
        name="s", dimensions=SPACE.dimensions | {"prune.protection": Dimension(low=1.0, high=4.0)}
    )
    lost = lambda c, n: 1 - sum(c.kept_units[n].values()) / 128
    options = {n: dict.fromkeys("01", (16, 32, 48, 64)) for n in BLOCKS}
    p = dataclasses.replace(
        problem(1.2), space=space, unit_choices=options, cross_modal={"a": "01"}, protection=1.0
    )
    of = lambda a, b: Candidate(
        kept_units={"a": dict.fromkeys("01", a), "b": dict.fromkeys("01", b)},
        precision=dict.fromkeys("ab", "int8"),
    )
    assert p.is_allowed(of(48, 32)) and p.is_allowed(of(32, 32)) and not p.is_allowed(of(16, 32))
    assert to_search_point(p, of(48, 32))["prune.protection"] == pytest.approx(2.0)
    assert to_search_point(p, of(64, 32))["prune.protection"] == 4.0
    free = lambda n, b, kept: (
        (64 - kept) * (1e-3 if n == "a" else 1.0)
    )  # what is protected seems to be worth nothing
    unbound = moves.cut_to_budget(
        dataclasses.replace(p, protection=0.0), of(64, 64), loss_increase=free
    )
    held = moves.cut_to_budget(p, of(64, 64), loss_increase=free)
    assert lost(unbound, "a") > lost(unbound, "b") and lost(held, "a") <= lost(held, "b")
    assert (
        PREDICT(held) <= 1.2
        and lost(moves.enforce_protection(p, unbound, loss_increase=free), "a")
        <= lost(unbound, "b") + 1e-9
    )


def test_fill_gives_back_where_it_undoes_most_until_the_budget_is_used():
    p = problem(2.5)
    p.unit_choices = {n: {b.name: (0, 16, 32, 48, 64) for b in bs} for n, bs in BLOCKS.items()}
    small = Candidate(
        kept_units={n: dict.fromkeys(("0", "1"), 16) for n in BLOCKS},
        precision=dict.fromkeys(BLOCKS, "int8"),
    )
    worth = lambda n, b, kept: (9.0 if n == "a" else 1.0) * (64 - kept)
    rounding = {n: {"fp32": 0.0, "int8": 1e-6} for n in BLOCKS}
    grown = moves.grow_to_budget(p, small, loss_increase=worth, rounding=rounding)
    assert 0.9 * 2.5 <= p.predict(grown) <= 2.5
    assert grown.kept_units["a"] == {"0": 64, "1": 64} and all(
        k >= 16 for k in grown.kept_units["b"].values()
    )
    assert moves.grow_to_budget(p, grown, loss_increase=worth, rounding=rounding) == grown
    dear = {n: {"fp32": 0.0, "int8": 1e6} for n in BLOCKS}  # so much that it is undone first
    assert set(
        moves.grow_to_budget(p, small, loss_increase=worth, rounding=dear).precision.values()
    ) == {"fp32"}


def test_an_exchange_pays_for_a_finer_precision_with_units():
    p = problem(3.6)
    p.unit_choices = {n: {b.name: (0, 16, 32, 48, 64) for b in bs} for n, bs in BLOCKS.items()}
    whole = Candidate(
        kept_units={n: dict.fromkeys(("0", "1"), 64) for n in BLOCKS},
        precision=dict.fromkeys(BLOCKS, "int8"),
    )
    worth = lambda n, b, kept: (9.0 if n == "a" else 1.0) * (64 - kept)
    rounding = {n: {"fp32": 0.0, "int8": 1.0} for n in BLOCKS}
    tight = dataclasses.replace(p, budget_ms=3.0)
    assert (
        moves.grow_to_budget(tight, whole, loss_increase=worth, rounding=rounding) == whole
    )  # either node in fp32 takes 3.4 ms
    found = moves.trade_for_precision(tight, whole, loss_increase=worth, rounding=rounding)
    assert [c.precision for c in found] == [{"a": "fp32", "b": "int8"}, {"a": "int8", "b": "fp32"}]
    assert all(p.predict(whole) < p.predict(c) <= 3.0 for c in found)


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(name, marks=[] if name in ("tpe", "random") else [pytest.mark.slow])
        for name in SAMPLERS.list_names()
    ],
)
def test_every_sampler_searches_within_the_budget_and_goes_on(tmp_path, sampler):
    count = 12
    if sampler == "gp":
        # A Gaussian process takes half a second for each proposal, and for each repetition of one.
        # Its first proposals are random: here the random sampler makes them.
        go(tmp_path / "s.journal", trials=STARTUP_TRIALS, mutations=0, sampler="random")
        count = STARTUP_TRIALS + 1
    trials = go(tmp_path / "s.journal", trials=count, mutations=0, sampler=sampler)
    assert len(trials) >= 4 and find_best_trial(trials, 2.5) is not None
    written = study.read_finished_trials(study.open_study(tmp_path / "s.journal"))
    assert len({trial.candidate.make_key() for trial in written}) == len(written) >= 8
    again = go(tmp_path / "s.journal", trials=count + 1, mutations=0, sampler=sampler)
    assert {t.candidate.make_key() for t in trials} <= {t.candidate.make_key() for t in again}


def test_parallel_branches_take_as_long_as_the_longest():
    both = dataclasses.replace(PREDICT, reads=dict.fromkeys(BLOCKS, ()))
    whole = Candidate(kept_units={n: {} for n in BLOCKS}, precision=dict.fromkeys(BLOCKS, "fp32"))
    parts = {n: PREDICT.predict_node_ms(n, whole) for n in BLOCKS}
    assert both(whole) == pytest.approx(max(parts.values()) + 0.2)
    assert PREDICT(whole) == pytest.approx(sum(parts.values()) + 0.2)


def test_a_rich_space_is_split_in_as_many_ways_as_can_be_solved():
    from math import prod

    every = ("fp32", "int8", "w8", "w4")
    harm = {n: {"fp32": 0.0, "int8": 0.1, "w8": 0.2, "w4": 0.3} for n in "abcd"}
    ms = {"fp32": 4.0, "int8": 1.0, "w8": 3.0, "w4": 2.0}
    window = [100, 200, 300, 400, 500, 600, 700]
    left, windows = splitting.limit_combinations(
        dict.fromkeys("abcd", every), harm, lengths=[window] * 2, whole_ms=lambda n, p: ms[p]
    )
    assert prod(map(len, left.values())) * prod(map(len, windows)) <= splitting.MAX_COMBINATIONS
    assert all(left[n] in (["fp32", "int8"], list(every)) for n in "abcd")
    assert all(w[0] == 100 and w[-1] == 700 for w in windows)
    some = {"a": ("fp32", "int8"), "b": ("fp32", "int8")}
    assert splitting.limit_combinations(
        some, harm, lengths=[window], whole_ms=lambda n, p: ms[p]
    ) == (
        {n: list(ps) for n, ps in some.items()},
        [window],
    )
    many = dict.fromkeys("abcdefghijkl", ("fp32", "int8"))
    alike = {n: {"fp32": 0.0, "int8": 0.1} for n in many}
    left, _ = splitting.limit_combinations(many, alike, lengths=[], whole_ms=lambda n, p: ms[p])
    assert prod(map(len, left.values())) <= splitting.MAX_COMBINATIONS and ["int8"] in left.values()
    # Thirty windows: three lengths of each are more than a machine can try.
    left, windows = splitting.limit_combinations(
        many, alike, lengths=[window] * 30, whole_ms=lambda n, p: ms[p]
    )
    assert prod(map(len, left.values())) * prod(map(len, windows)) <= splitting.MAX_COMBINATIONS
    assert windows[0] == [100, 400, 700] and windows[-1] == [700]


def test_of_splits_that_do_no_harm_the_knapsack_takes_the_largest():
    costs, none = [np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0])], [np.zeros(3), np.zeros(3)]
    assert sum(
        choose_options_within_budget(costs, none, budget=3.1)
    ) == 3 and choose_options_within_budget(costs, none, budget=9.0) == [2, 2]


def test_a_job_takes_its_readings_and_its_space_along(tmp_path):
    (tmp_path / "far.json").write_text("{}")
    (tmp_path / "joint.yaml").write_text("name: s\n")
    work = tmp_path / "work"
    work.mkdir()
    spec = {"nodes": {}, "measure": {"readings": str(tmp_path / "far.json"), "threads": 2}}
    jobs._fill_work_folder(work, spec, space=tmp_path / "joint.yaml")
    sent = yaml.safe_load((work / "spec.yaml").read_text())
    assert sent["measure"] == {"readings": "device.json", "threads": 2}
    assert (work / "device.json").read_text() == "{}"
    assert (work / "space.yaml").exists()
    assert spec["measure"]["readings"] == str(tmp_path / "far.json")  # the caller's stays
    missing = {"nodes": {}, "measure": {"readings": "nowhere.json"}}
    with pytest.raises(SpecError, match=r"measure\.readings: nowhere\.json: no such file"):
        jobs._fill_work_folder(work, missing, space=tmp_path / "joint.yaml")


def test_a_job_takes_no_weights_along_that_its_spec_does_not_name(tmp_path):
    own = jobs._copy_package(tmp_path / "own", {"nodes": {"a": {"source": "/shared/vit"}}})
    embedded = jobs._copy_package(tmp_path / "demo", {"nodes": {"a": {"source": "embedded:x/y"}}})
    assert (own / "models" / "sources.py").exists() and not list(own.rglob("*.safetensors"))
    assert list(embedded.rglob("*.safetensors"))


def test_what_goes_along_is_bounded_and_named(tmp_path, monkeypatch):
    (tmp_path / "my_plugin").mkdir()
    (tmp_path / "my_plugin" / "weights.bin").write_bytes(bytes(3_000_000))
    jobs._check_upload(tmp_path)
    monkeypatch.setattr(jobs, "MAX_UPLOAD_MB", 2)
    with pytest.raises(
        SpecError, match=r"takes 3 MB, and at most 2 MB are sent. 'my_plugin' has 3"
    ):
        jobs._check_upload(tmp_path)


def test_what_only_the_cluster_may_see_is_listed(tmp_path):
    nodes = {"a": {"source": str(tmp_path)}, "b": {"source": "/no/where"}, "c": {"source": "pip:x"}}
    data = {"options": {"path": "/no/photos"}}
    missing = jobs.list_missing_folders({"nodes": nodes, "data": data})
    assert missing == ["nodes.b.source: /no/where", "data.options.path: /no/photos"]


def test_an_address_is_told_without_its_password_and_needs_a_scheme():
    with pytest.raises(SpecError, match="expected http://HOST:8265"):
        jobs.connect_to_server("127.0.0.1:8265")
    with pytest.raises(ClusterError, match=r"no job server answers at http://\*\*\*@127") as told:
        jobs.connect_to_server("http://me:secret@127.0.0.1:9")
    assert "secret" not in str(told.value)


class LoggedJob:
    """A job server with one job, whose log has two pieces."""

    def __init__(self, status, error=None):
        self.status = status
        self.error = error

    async def tail_job_logs(self, job_id):
        yield "one\n"
        yield "two\n"
        if self.error:
            raise self.error

    def get_job_status(self, job_id):
        return self.status


@pytest.mark.parametrize("method", ["get_job_status", "get_job_info"])
def test_a_job_server_that_is_gone_is_told_and_the_job_may_go_on(method):
    def refuse(job_id):
        raise ConnectionError("refused by http://me:secret@head:8265")

    client = LoggedJob(JobStatus.SUCCEEDED)
    client.get_job_info = refuse
    setattr(client, method, refuse)
    with pytest.raises(
        ClusterError, match="the job may go on: see `mmcompress job status j`"
    ) as told:
        jobs.follow_job(client, "j", log=io.StringIO())
    assert "secret" not in str(told.value)


def test_the_log_of_a_job_is_followed_to_its_end():
    log = io.StringIO()
    assert jobs._follow_log(LoggedJob(JobStatus.FAILED), "j", log=log) == JobStatus.FAILED
    assert log.getvalue() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (LoggedJob(JobStatus.RUNNING), "was closed"),
        (LoggedJob(JobStatus.RUNNING, RuntimeError("code 1006")), "code 1006"),
        (LoggedJob(JobStatus.RUNNING, aiohttp.ClientError("gone")), "gone"),
    ],
)
def test_a_log_that_breaks_off_is_told_with_its_job(job, reason):
    with pytest.raises(ClusterError, match=f"log of job j broke off: .*{reason}"):
        jobs._follow_log(job, "j", log=io.StringIO())


def test_names_of_readings_become_absolute(tmp_path):
    (tmp_path / "far.json").write_text("{}")
    (tmp_path / "spec.yaml").write_text("nodes: {}\nmeasure: {readings: far.json}\n")
    document = load_document(tmp_path / "spec.yaml")
    assert document["measure"]["readings"] == str(tmp_path / "far.json")


def test_a_search_whose_trials_do_not_begin_says_what_they_wait_for(tmp_path, monkeypatch):
    """Ray waits without a word for a node that has room."""
    monkeypatch.setattr("mmcompress.search.search_session.QUIET_SECONDS", 0.05)

    class SlowExecutor(ThreadPoolExecutor):
        def submit(self, evaluate, /, *args, **kwargs):
            return super().submit(self._answer, evaluate, args)

        def _answer(self, evaluate, args):
            time.sleep(0.2)
            return {**evaluate(None, *args), "worker": "here"}

        def explain_wait(self):
            return "a trial reserves 64 CPU"

    told = []
    with SlowExecutor(1) as executor:
        go(
            tmp_path / "j",
            trials=1,
            mutations=0,
            executor=executor,
            progress=lambda message, share: told.append(message),
        )
    assert "no trial has ended for 0 min: a trial reserves 64 CPU" in told
