"""What an artifact writes and how quickly it writes are told apart, and only speed is learned of."""

from __future__ import annotations

import pytest
from made_summary import make_summary

from mmcompress.graph.structure import Candidate
from mmcompress.measure.latency.bench import Samples
from mmcompress.results.records import Attempt, DecodeSteps, FreeWriting
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.free_writing import estimate_free_writing
from mmcompress.run.next_artifact import Artifact, ArtifactLimits, plan_artifact
from mmcompress.run.warnings import list_warnings
from mmcompress.spec.schema import Limits
from mmcompress.stats import Latency

VISION_MS = 2.0
"""Milliseconds of a request outside the generator."""

LIMITS = ArtifactLimits(bounds=Limits(), max_artifacts=3, search_effort=0)


def make_samples(steps, *, step_ms):
    """What is observed of a pipeline whose captioner takes some steps a request."""
    captioner_ms = [step_ms * count for count in steps]
    return Samples(
        ms=[VISION_MS + ms for ms in captioner_ms],
        nodes={"vision": [VISION_MS] * len(steps), "captioner": captioner_ms},
        decode_steps={"captioner": list(steps)},
    )


def make_fitted(measured_ms=0.97, **changes):
    """A structure whose captioner took half as long as the dense one before its training."""
    attempt = Attempt(
        predicted_ms=0.97, measured_ms=measured_ms, target_ms=1.0, node_ratios={"captioner": 0.5}
    )
    fields = {
        "candidate": Candidate(kept_units={}, precision={}),
        "predicted_ms": 0.97,
        "measured_ms": measured_ms,
        "target_ms": 1.0,
        "search_effort": 0,
        "correction": 1.0,
        "attempts": (attempt,),
    }
    return FittedStructure(**fields | changes)


def estimate(compressed, dense, **changes):
    return estimate_free_writing(
        compressed, dense, fitted=make_fitted(**changes), distinct_requests=8
    )


def make_artifact(share, *, writing, fitted=None):
    """A finished artifact of a target of 1 ms."""
    made = make_summary(writing=writing)
    summary = make_summary(
        writing=writing,
        target=type(made.target)(latency_ms=1.0, speedup=2.0, met=share <= 1, text="2x"),
        compressed=type(made.compressed)(
            **vars(made.compressed) | {"latency_ms": Latency(p50=share, p95=share, n=9)}
        ),
    )
    return Artifact(fitted=fitted or make_fitted(), summary=summary)


def test_more_tokens_and_slower_steps_are_told_apart():
    dense = make_samples([10, 10, 10, 10], step_ms=1.0)
    writing = estimate(make_samples([11, 11, 11, 11], step_ms=0.51), dense)
    captioner = writing.nodes["captioner"]
    assert (captioner.dense, captioner.compressed) == (10, 11)
    assert captioner.more_tokens == pytest.approx(0.1)
    assert captioner.ratio == pytest.approx(0.51)
    assert captioner.slower_step == pytest.approx(0.02)
    assert writing.latency_factor == pytest.approx((2 + 5.61) / (2 + 5.1))
    assert captioner.describe() == (
        "writes 10.0% more tokens than the dense one, "
        "and a step takes 2.0% longer than before the training"
    )


def test_who_writes_the_dense_texts_writes_nothing_more():
    """The steps differ from request to request, and are those of the dense pipeline in each."""
    steps = [3, 9, 5, 14]
    writing = estimate(make_samples(steps, step_ms=0.5), make_samples(steps, step_ms=1.0))
    assert writing.latency_factor == 1 and writing.margin == 0
    assert writing.nodes["captioner"].more_tokens == 0


def test_the_margin_of_what_is_written_is_over_different_requests():
    """To send the same requests again makes nothing more certain."""
    dense, free = [10] * 8, [8, 12, 10, 11, 9, 13, 10, 12]
    once = estimate(make_samples(free, step_ms=0.5), make_samples(dense, step_ms=1.0))
    again = estimate(make_samples(free * 9, step_ms=0.5), make_samples(dense * 9, step_ms=1.0))
    assert 0 < once.margin == pytest.approx(again.margin)


def test_a_trimmed_structure_was_not_measured_before_its_training():
    dense = make_samples([10] * 4, step_ms=1.0)
    free = make_samples([9] * 4, step_ms=0.5)
    captioner = estimate(free, dense, is_trimmed=True).nodes["captioner"]
    assert captioner.slower_step is None
    assert captioner.describe() == "writes 10.0% fewer tokens than the dense one"


def test_the_structure_that_was_chosen_is_compared_with_its_own_measurement():
    """It need not be the last one that was measured."""
    fitted = make_fitted()
    other = Attempt(predicted_ms=1.0, measured_ms=1.2, target_ms=1.0, margin=0.5)
    later = make_fitted(attempts=(*fitted.attempts, other))
    assert later.find_measurement() == fitted.attempts[0]
    assert later.next_final_to_fitted(1.02) == fitted.next_final_to_fitted(1.02) > 1


def test_requests_without_a_step_say_nothing_of_steps():
    dense = make_samples([10, 10], step_ms=1.0)
    assert estimate(make_samples([0, 10], step_ms=0.5), dense) == FreeWriting()


def test_only_the_speed_of_equal_work_is_learned():
    """An artifact within its target that wrote less is no reason to keep more, nor to keep less."""
    wrote_less = make_artifact(0.90, writing=FreeWriting(latency_factor=0.90 / 0.97))
    plan = plan_artifact([wrote_less], LIMITS)
    assert plan.final_to_fitted == pytest.approx(1) and plan.writing_factor == 1
    was_quicker = make_artifact(0.90, writing=FreeWriting())
    assert plan_artifact([was_quicker], LIMITS).final_to_fitted == pytest.approx(0.90 / 0.97)


def test_after_a_miss_longer_texts_are_made_up_for():
    """Only as far as they exceed their own margin, and apart from the speed of a step."""
    writing = FreeWriting(latency_factor=1.10, margin=0.03)
    missed = make_artifact(1.10 * 0.97, writing=writing)
    plan = plan_artifact([missed], LIMITS)
    assert 1.06 < plan.writing_factor < 1.07
    assert plan.final_to_fitted == pytest.approx(plan.writing_factor)
    # The next one is fitted with the factor; it writes like the dense pipeline.
    fitted = make_fitted(final_to_fitted=plan.final_to_fitted, writing_factor=plan.writing_factor)
    share = 0.97 / plan.writing_factor
    hit = make_artifact(share, writing=FreeWriting(), fitted=fitted)
    assert plan_artifact([missed, hit], LIMITS).final_to_fitted == pytest.approx(1)


def test_a_wide_margin_at_the_end_is_told_with_its_figure():
    certain = make_summary(latency_margin=0.015)
    uncertain = make_summary(latency_margin=0.023)
    near = make_summary(latency_margin=0.05)
    of_margin = lambda summary: [w for w in list_warnings(summary) if "both latencies" in w]
    assert of_margin(certain) == []
    [text] = of_margin(uncertain)
    assert "may be off by 2.3%" in text and "over the loads of 3 parts; 1.5% is wanted" in text
    assert "by less than that" not in text
    assert "The target is met by less than that (96.0% of it)" in of_margin(near)[0]


def test_the_share_of_a_step_needs_a_measurement_before_the_training():
    assert DecodeSteps(dense=8, compressed=8, ratio=0.5).slower_step is None
