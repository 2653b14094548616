"""Why a structure was chosen, in words."""

from __future__ import annotations

from dataclasses import replace

from mmcompress.graph.structure import Candidate
from mmcompress.results.records import Trial
from mmcompress.run.approach_target import FitAttempt
from mmcompress.run.explain_structure import explain_structure
from mmcompress.run.structure_benchmark import StructureBenchmark

TARGET_MS = 10.0

ATTEMPT = FitAttempt(
    trial=Trial(
        number=7,
        origin="sampled",
        overrides={},
        candidate=Candidate(kept_units={}, precision={}),
        latency_ms=9.7,
        loss=0.4,
        quality={},
        evaluation_seconds=0.0,
    ),
    predicted_ms=9.7,
    benchmark=StructureBenchmark(ms=9.8, worst_limit_ratio=0.0, margin=0.01, node_ratios={}),
    measured_ms=9.8,
    bounded_ms=9.8,
    expected_ms=9.8,
)
"""A structure at 98 % of the target."""


def explain(chosen, *others, short_losses=()):
    attempts = [*others, chosen]
    return explain_structure(chosen, attempts, target_ms=TARGET_MS, short_losses=short_losses)


def test_the_best_trial_is_called_that():
    assert explain(ATTEMPT) == (
        "Of the structures within the target, it has the least loss before training "
        "(0.400; sampled)."
    )


def test_a_structure_of_less_loss_that_measures_too_slow_is_named():
    slower = replace(ATTEMPT, trial=replace(ATTEMPT.trial, loss=0.3), expected_ms=10.3)
    sentences = explain(ATTEMPT, slower)
    assert "Of 2 structures that were measured before training, it lies best: 98.0%" in sentences
    assert "Structure 1 has less loss (0.300), but 103.0% of the target are expected" in sentences


def test_the_winner_of_the_short_trainings_is_told_with_the_next_one():
    sentences = explain(ATTEMPT, short_losses=[0.7, 0.4, 0.5])
    assert "trained for a short while" in sentences
    assert "(0.400; sampled), the next one with 0.500." in sentences


def test_nothing_within_the_target_is_told():
    fastest = replace(ATTEMPT, predicted_ms=12.0)
    assert explain(fastest) == (
        "No structure is predicted to meet the target, so the fastest one was taken."
    )
