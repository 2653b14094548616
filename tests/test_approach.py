"""What a measured structure teaches of the next one, node by node."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from small_search import PREDICT

from mmcompress.graph.structure import Candidate
from mmcompress.results.records import Trial
from mmcompress.run.approach_target import (
    ApproachOptions,
    FitAttempt,
    approach_target,
    expect_latencies,
    is_clear_miss,
)
from mmcompress.run.fitted_structure import FitTolerances
from mmcompress.run.structure_benchmark import MIN_MARGIN, StructureBenchmark
from mmcompress.runtime.progress import ignore_progress
from mmcompress.spec.schema import Limits

SLOWER = {"a": 1.4, "b": 0.8}
"""Latency of each node as it runs / as it is predicted."""

DENSE_MS = {"a": 5.0, "b": 3.0}
"""Milliseconds of the dense nodes."""


def make_trial(units, predictor):
    kept_units = {"a": {"0": units, "1": 64}, "b": {"0": 64, "1": units}}
    candidate = Candidate(kept_units=kept_units, precision={"a": "fp32", "b": "fp32"})
    return make_trial_of(candidate, predictor)


def make_trial_of(candidate, predictor):
    return Trial(
        number=0,
        origin="seed",
        overrides={},
        candidate=candidate,
        latency_ms=predictor(candidate),
        loss=0.0,
        quality={},
        evaluation_seconds=0.0,
    )


def measure(candidate):
    node_ms = {node: SLOWER[node] * PREDICT.predict_node_ms(node, candidate) for node in SLOWER}
    return StructureBenchmark(
        ms=PREDICT.overhead_ms + sum(node_ms.values()),
        worst_limit_ratio=0.0,
        margin=MIN_MARGIN,
        node_ratios={node: node_ms[node] / DENSE_MS[node] for node in node_ms},
    )


def make_options(max_attempts, *, dense_node_ms):
    return ApproachOptions(
        target_ms=4.0,
        limits=Limits(),
        final_to_fitted=1.0,
        first_attempt=0,
        reference_runs=Path("nowhere"),
        tolerances=replace(FitTolerances(), max_attempts=max_attempts),
        dense_node_ms=dense_node_ms,
    )


def approach(units_by_attempt, dense_node_ms):
    options = make_options(len(units_by_attempt), dense_node_ms=dense_node_ms)

    def propose(predictor, budget_ms, attempt):
        return make_trial(units_by_attempt[attempt], predictor)

    return approach_target(
        propose,
        PREDICT,
        options=options,
        measure=lambda candidate, predicted_ms: measure(candidate),
        progress=ignore_progress,
    )


def test_every_node_is_corrected_by_its_own_error():
    result = approach([64], DENSE_MS)
    assert result.node_corrections == pytest.approx(SLOWER)
    other = Candidate(
        kept_units={"a": {"0": 16, "1": 32}, "b": {"0": 64, "1": 64}},
        precision={"a": "fp32", "b": "fp32"},
    )
    assert result.predictor(other) == pytest.approx(measure(other).ms)
    for node, slower in SLOWER.items():
        predicted_ms = result.predictor.predict_node_ms(node, other)
        assert predicted_ms == pytest.approx(slower * PREDICT.predict_node_ms(node, other))


def test_without_latencies_of_the_nodes_all_are_corrected_alike():
    result = approach([64], {})
    assert result.node_corrections == {}
    measured = make_trial(64, PREDICT).candidate
    assert result.predictor(measured) == pytest.approx(measure(measured).ms)
    share = result.predictor.predict_node_ms("a", measured) / result.predictor(measured)
    assert share == pytest.approx(PREDICT.predict_node_ms("a", measured) / PREDICT(measured))


def test_measurements_of_nearly_one_structure_are_taken_together():
    """A single one is off by a percent or two, and would be chased from structure to structure."""
    measured_ms = {60: 4.4, 61: 3.9, 62: 4.1}
    predictions = [PREDICT(make_trial(units, PREDICT).candidate) for units in measured_ms]
    attempts = make_attempts(measured_ms)
    logs = [
        math.log(ms / predicted)
        for ms, predicted in zip(measured_ms.values(), predictions, strict=True)
    ]
    weighted = (0.5 * logs[0] + 0.5 * logs[1] + logs[2]) / 2
    assert attempts[-1].expected_ms == pytest.approx(predictions[-1] * math.exp(weighted))
    # Each counts most for its own structure.
    assert attempts[0].expected_ms > attempts[2].expected_ms > attempts[1].expected_ms


def test_the_measurement_of_another_size_tells_nothing_of_a_structure():
    attempts = make_attempts({64: 9.0, 24: 3.0})
    assert [attempt.expected_ms for attempt in attempts] == [9.0, 3.0]


def make_attempts(measured_ms):
    """Return attempts that measured the given milliseconds, by the units of their structures."""
    attempts = []
    for units, ms in measured_ms.items():
        benchmark = StructureBenchmark(
            ms=ms, worst_limit_ratio=0.0, margin=MIN_MARGIN, node_ratios={}
        )
        trial = make_trial(units, PREDICT)
        attempts.append(
            FitAttempt(
                trial=trial,
                predicted_ms=trial.latency_ms,
                benchmark=benchmark,
                measured_ms=ms,
                bounded_ms=ms,
                expected_ms=math.nan,
            )
        )
    options = make_options(len(attempts), dense_node_ms={})
    return expect_latencies(attempts, PREDICT, options=options)


def test_the_first_prediction_uses_what_earlier_fits_have_learned():
    options = replace(make_options(1, dense_node_ms=DENSE_MS), learned_corrections=SLOWER)
    predictions = []

    def propose(predictor, budget_ms, attempt):
        trial = make_trial(48, predictor)
        predictions.append(predictor(trial.candidate))
        return trial

    result = approach_target(
        propose,
        PREDICT,
        options=options,
        measure=lambda candidate, predicted_ms: measure(candidate),
        progress=ignore_progress,
    )
    [attempt] = result.attempts
    assert predictions == [pytest.approx(attempt.measured_ms)]
    # They are of the predictor itself, so they are not learned twice.
    assert result.node_corrections == pytest.approx(SLOWER)


@pytest.mark.parametrize(
    ("share", "is_clear"), [(0.89, True), (0.91, False), (1.0, False), (1.04, False), (1.06, True)]
)
def test_what_misses_by_far_is_not_measured_any_longer(share, is_clear):
    assert is_clear_miss(share) is is_clear
