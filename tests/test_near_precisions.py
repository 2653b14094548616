"""A node whose precisions are predicted alike is measured in both, and goes on in the better one."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from small_search import BLOCKS, PREDICT
from test_approach import make_options, make_trial_of

from mmcompress.graph.structure import Candidate
from mmcompress.run.approach_target import approach_target
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.near_precisions import (
    PrecisionComparison,
    change_precisions,
    correct_by_comparisons,
    find_near_precisions,
    prefer_fp32,
)
from mmcompress.run.stages import prepare_run
from mmcompress.run.structure_benchmark import (
    MIN_MARGIN,
    StructureBenchmark,
    measure_structure,
)
from mmcompress.runtime.progress import ignore_progress
from mmcompress.storage import read_record
from mmcompress.workspace.context import open_run

PRECISIONS = dict.fromkeys(BLOCKS, ("fp32", "int8"))
"""What each node may have."""

INT8 = Candidate(
    kept_units={node: {"0": 64, "1": 64} for node in BLOCKS},
    precision=dict.fromkeys(BLOCKS, "int8"),
)
"""A structure that is predicted to take 1.1 ms in each node, and 2.1 ms in fp32."""

NEARLY_ALIKE = PREDICT.correct_precision("a", precision="fp32", factor=1.05 * 1.1 / 2.1)
"""Predicts node `a` to be 5 % slower in fp32, and node `b` nearly twice as slow."""


def test_only_nodes_within_a_tenth_are_measured_in_both():
    assert find_near_precisions(INT8, PREDICT, precisions=PRECISIONS) == {}
    assert find_near_precisions(INT8, NEARLY_ALIKE, precisions=PRECISIONS) == {"a": "fp32"}
    fp32 = change_precisions(INT8, {"a": "fp32"})
    assert find_near_precisions(fp32, NEARLY_ALIKE, precisions=PRECISIONS) == {"a": "int8"}
    assert find_near_precisions(INT8, NEARLY_ALIKE, precisions={"a": ("int8",)}) == {}


@pytest.mark.parametrize("outside_ms", [0.0, 0.4])
def test_a_comparison_corrects_one_precision_of_one_node(outside_ms):
    predictor = replace(NEARLY_ALIKE, outside_sessions_ms={"a": outside_ms})
    comparisons = {"a": PrecisionComparison(precision="fp32", ratio=0.9)}
    corrected = correct_by_comparisons(predictor, INT8, comparisons=comparisons)
    fp32 = change_precisions(INT8, {"a": "fp32"})
    own_ms = predictor.predict_node_ms("a", INT8)
    assert corrected.predict_node_ms("a", INT8) == pytest.approx(own_ms)
    assert corrected.predict_node_ms("a", fp32) == pytest.approx(0.9 * own_ms)
    for candidate in (INT8, change_precisions(INT8, {"b": "fp32"})):
        expected_ms = predictor.predict_node_ms("b", candidate)
        assert corrected.predict_node_ms("b", candidate) == pytest.approx(expected_ms)


@pytest.mark.parametrize(("ratio", "precision"), [(0.98, "fp32"), (1.02, "int8")])
def test_what_is_no_slower_in_fp32_goes_on_in_fp32(ratio, precision):
    comparisons = {"a": PrecisionComparison(precision="fp32", ratio=ratio)}
    corrected = correct_by_comparisons(NEARLY_ALIKE, INT8, comparisons=comparisons)
    chosen = prefer_fp32(INT8, corrected, precisions=PRECISIONS)
    assert chosen == change_precisions(INT8, {"a": precision})
    # The search may not choose what the space does not hold.
    assert prefer_fp32(INT8, corrected, precisions={}) == INT8


@pytest.mark.parametrize(("ratio", "attempts"), [(0.98, 2), (1.02, 1)])
def test_a_fit_that_is_near_enough_goes_on_where_fp32_costs_nothing(ratio, attempts):
    """The structure is accepted at once; the next proposal knows what the comparison taught."""
    proposed = []

    def propose(predictor, budget_ms, attempt):
        candidate = INT8
        if proposed:
            candidate = prefer_fp32(INT8, predictor, precisions=PRECISIONS)
        proposed.append(candidate)
        return make_trial_of(candidate, predictor)

    def measure(candidate, predicted_ms):
        comparisons = {}
        if candidate == INT8:
            comparisons = {"a": PrecisionComparison(precision="fp32", ratio=ratio)}
        return StructureBenchmark(
            ms=0.975 * 4.0,
            worst_limit_ratio=0.0,
            margin=MIN_MARGIN,
            node_ratios={},
            other_precisions=comparisons,
        )

    result = approach_target(
        propose,
        NEARLY_ALIKE,
        options=make_options(4, dense_node_ms={}),
        measure=measure,
        progress=ignore_progress,
    )
    assert len(result.attempts) == attempts
    assert proposed[1:] == [change_precisions(INT8, {"a": "fp32"})] * (attempts - 1)


def test_a_node_is_measured_in_both_precisions_in_the_same_turns(
    tiny, run_folder, machine, tmp_path
):
    out = tmp_path / "r"
    shutil.copytree(run_folder, out)
    run = open_run(tiny / "spec.yaml", out, resume=True, **machine)
    prepared = prepare_run(run)
    candidate = read_record(FittedStructure, prepared.run.folder.fitted).candidate
    own = candidate.precision["vision"]
    other = "fp32" if own == "int8" else "int8"
    benchmark = measure_structure(
        prepared.run,
        prepared.sensitivity,
        candidate=candidate,
        dense=prepared.dense,
        near_precisions={"vision": other},
    )
    comparison = benchmark.other_precisions["vision"]
    assert comparison.precision == other and comparison.ratio > 0
    # What is compared is no whole pipeline: the runs of those must not hold it.
    assert "other" not in prepared.run.shared.reference_runs.read_text(encoding="utf-8")
    assert not prepared.run.folder.scratch.exists()
