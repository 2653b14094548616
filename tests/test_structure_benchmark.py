"""How certain the measurement of a structure is, and what a busy machine does to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmcompress.measure.cost_model.drift import (
    append_reference_run,
    load_reference_runs,
)
from mmcompress.measure.latency.bench import BenchmarkOptions, Samples
from mmcompress.measure.latency.bench_with_replay import MAX_LOADS, bench_with_replay
from mmcompress.run.structure_benchmark import (
    MAX_MARGIN,
    MIN_MARGIN,
    ReferenceComparison,
    StructureBenchmark,
    choose_references,
    compute_paired_node_ratios,
    compute_reference_ratios,
    estimate_margin,
)

PRECISION = {"n": "int8"}
REQUESTS_PER_LOAD = 100
LOADS = 4


def make_samples(ms: np.ndarray, loads: int = LOADS) -> Samples:
    """Return what was observed of a pipeline of one node."""
    count = len(ms)
    return Samples(
        ms=list(ms),
        session_shares=[1.0] * count,
        nodes={"n": list(ms)},
        in_session={"n": list(ms)},
        load_requests=[count // loads] * loads,
    )


def observe(rng: np.random.Generator, *, speed=0.5, int8_pace=1.0, load_spread=0.0):
    """Return samples of a structure, the dense pipeline and the int8 one on a busy machine.

    Requests are of many lengths. The machine's pace wanders, and what is rounded feels it
    otherwise (`int8_pace`). Each load of the structure is quicker or slower (`load_spread`).
    """
    count = LOADS * REQUESTS_PER_LOAD
    length = rng.uniform(0.7, 1.4, count)
    pace = np.repeat(rng.uniform(0.9, 1.2, count // 20), 20)
    load = np.repeat(rng.normal(1, load_spread, LOADS), REQUESTS_PER_LOAD)
    noise = rng.lognormal(0, 0.05, (3, count))
    dense = 20 * length * pace * noise[0]
    int8 = 12 * length * pace * int8_pace * noise[1]
    structure = speed * 20 * length * pace * int8_pace * load * noise[2]
    return {
        "new": make_samples(structure),
        "fp32": make_samples(dense),
        "int8": make_samples(int8),
    }


def compare(samples) -> ReferenceComparison:
    references = choose_references(PRECISION, samples)
    ratio = float(np.median(compute_reference_ratios(samples, references)))
    return ReferenceComparison(references=references, ratio=ratio, dense_ms=20.0)


def test_a_node_is_compared_with_the_whole_node_in_its_precision():
    samples = observe(np.random.default_rng(0))
    assert choose_references({"n": "int8"}, samples) == {"n": "int8"}
    assert choose_references({"n": "fp32"}, samples) == {"n": "fp32"}
    assert choose_references({}, samples) == {"n": "fp32"}  # a node without a model
    del samples["int8"]
    assert choose_references({"n": "int8"}, samples) == {"n": "fp32"}


def test_the_ratio_of_a_structure_hangs_neither_on_lengths_nor_on_the_pace_of_the_machine():
    """Medians of all requests jump several times as far as the median of the ratios of pairs."""
    rng = np.random.default_rng(1)
    paired, unpaired = [], []
    for _ in range(40):
        samples = observe(rng)
        paired.append(compare(samples).ratio)
        unpaired.append(np.median(samples["new"].ms) / np.median(samples["int8"].ms))
    assert np.mean(paired) == pytest.approx(10 / 12, rel=0.005)
    assert np.std(paired) < 0.6 * np.std(unpaired)


def test_one_structure_measures_the_same_while_int8_is_slower_for_minutes(tmp_path):
    """What the whole int8 pipeline took in the same minutes tells by how much."""
    rng = np.random.default_rng(2)
    record = tmp_path / "reference_runs.json"
    comparisons, raw_ms = [], []
    for int8_pace in (1.0, 1.1, 0.95, 1.05):
        samples = observe(rng, int8_pace=int8_pace)
        raw_ms.append(20 * np.median(samples["new"].ms) / np.median(samples["fp32"].ms))
        comparisons.append(compare(samples))
        del samples["new"]
        append_reference_run(record, samples)
    runs = load_reference_runs(record)
    long_run_ms = [comparison.estimate_long_run_ms(runs) for comparison in comparisons]
    assert np.ptp(raw_ms) / np.mean(raw_ms) > 0.08
    assert np.ptp(long_run_ms) / np.mean(long_run_ms) < 0.02
    assert np.mean(long_run_ms) == pytest.approx(10 * 1.025, rel=0.02)


def test_what_was_measured_before_is_seen_in_the_light_of_all_later_runs(tmp_path):
    record = tmp_path / "reference_runs.json"

    def append(int8_ms):
        samples = {
            "fp32": make_samples(np.full(8, 10.0)),
            "int8": make_samples(np.full(8, int8_ms)),
        }
        append_reference_run(record, samples)

    append(4.0)
    benchmark = StructureBenchmark(
        ms=3.0,
        worst_limit_ratio=0.0,
        margin=MIN_MARGIN,
        node_ratios={"n": 0.3},
        comparison=ReferenceComparison(references={"n": "int8"}, ratio=0.75, dense_ms=10.0),
    )
    assert benchmark.estimate_long_run_ms(record) == pytest.approx(3.0)
    append(5.0)
    assert benchmark.estimate_long_run_ms(record) == pytest.approx(0.75 * 4.5)
    # Milliseconds were asked for.
    assert replace(benchmark, comparison=None).estimate_long_run_ms(Path("nowhere")) == 3.0


@pytest.mark.parametrize("load_spread", [0.0, 0.01, 0.03])
def test_the_margin_covers_what_the_next_measurement_finds(load_spread):
    """The interval of 95 % over the loads holds the true ratio in at least nine of ten cases."""
    rng = np.random.default_rng(3)
    held = []
    for _ in range(200):
        samples = observe(rng, load_spread=load_spread)
        references = choose_references(PRECISION, samples)
        margin = estimate_margin(samples, references)
        held.append(abs(compare(samples).ratio / (10 / 12) - 1) <= margin)
    assert np.mean(held) >= 0.9


def test_the_margin_of_one_load_is_estimated_from_its_parts():
    rng = np.random.default_rng(4)
    samples = observe(rng)
    for pipeline in samples.values():
        pipeline.load_requests = [LOADS * REQUESTS_PER_LOAD]
    references = choose_references(PRECISION, samples)
    assert estimate_margin(samples, references) >= MIN_MARGIN
    samples["new"].ms[:200] = [1.3 * ms for ms in samples["new"].ms[:200]]
    assert estimate_margin(samples, references) > 0.1


def test_a_tail_is_less_certain_than_the_middle():
    """Its margin covers what the next measurement of the tail finds."""
    rng = np.random.default_rng(5)
    references = {"n": "fp32"}

    def draw():
        return make_samples(rng.lognormal(0, 0.1, 400))

    samples = {"new": draw(), "fp32": make_samples(np.ones(400))}
    middle_margin = estimate_margin(samples, references)
    tail_margin = estimate_margin(samples, references, statistic="p95")
    assert middle_margin < tail_margin <= MAX_MARGIN
    true_p95 = np.exp(0.1 * 1.645)
    errors = [np.percentile(draw().ms, 95) / true_p95 - 1 for _ in range(100)]
    assert np.mean(np.abs(errors) <= tail_margin) >= 0.9


def test_node_ratios_are_medians_over_the_same_requests():
    structure = Samples(ms=[3.0, 6.0, 9.0], nodes={"n": [1.0, 2.0, 30.0], "choose": [0.0] * 3})
    dense = Samples(ms=[6.0, 12.0, 18.0], nodes={"n": [2.0, 4.0, 6.0], "choose": [0.0] * 3})
    assert compute_paired_node_ratios(structure, dense) == {"n": 0.5}


def bench(is_certain, dense_ms=20.0):
    """Measure two fake bundles; returns the samples and the first request of every load."""
    first_requests = []

    def benchmark(job, folder):
        first_requests.append(job.options.first_request)
        return {name: make_samples(np.full(10, 2.0), loads=1) for name in job.bundles}

    samples = bench_with_replay(
        {"new": Path("a"), "fp32": Path("b")},
        [{"text": str(i)} for i in range(64)],
        options=BenchmarkOptions(warmup=4, max_requests=400, traces=({},) * 64),
        dense_ms=dense_ms,
        benchmark=benchmark,
        is_certain=is_certain,
    )
    return samples, first_requests


@pytest.mark.parametrize(("needed", "loads"), [(1, 4), (5, 5), (99, MAX_LOADS)])
def test_a_comparison_is_loaded_again_until_it_is_certain(needed, loads):
    """Each load goes on with the request where the last one ended."""
    samples, first_requests = bench(lambda samples: len(samples["new"].load_requests) >= needed)
    assert first_requests == [10 * i % 64 for i in range(loads)]
    assert samples["new"].load_requests == samples["fp32"].load_requests == [10] * loads


def test_a_slow_pipeline_is_loaded_once_however_uncertain_it_is():
    _, first_requests = bench(lambda samples: False, dense_ms=2000.0)
    assert first_requests == [0]
