"""What a measured structure teaches of the next one, node by node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_search import PREDICT

from mmcompress.graph.structure import Candidate
from mmcompress.results.records import Trial
from mmcompress.run.approach_target import ApproachOptions, approach_target
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


def approach(units_by_attempt, dense_node_ms):
    options = ApproachOptions(
        target_ms=4.0,
        limits=Limits(),
        final_to_fitted=1.0,
        first_attempt=0,
        reference_runs=Path("nowhere"),
        tolerances=replace(FitTolerances(), max_attempts=len(units_by_attempt)),
        dense_node_ms=dense_node_ms,
    )

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
