"""Every artifact that is made for a target stands in its summary and report, kept or not."""

from __future__ import annotations

import pytest
from fake_stages import FakeStages
from made_summary import KEPT_UNITS, make_summary

from mmcompress.graph.structure import Candidate
from mmcompress.report.artifact_rows import describe_structure
from mmcompress.report.page import write_report
from mmcompress.results.records import ArtifactRecord, DecodeSteps, FreeWriting
from mmcompress.run.next_artifact import explain_choice
from mmcompress.run.run_policy import RunPolicy
from mmcompress.workspace.load_summary import load_summary


def describe(summary):
    """Return share, loss, steps and fate of every artifact."""
    return [
        (record.target_share, record.loss, record.trained_steps, record.is_kept)
        for record in summary.artifacts
    ]


@pytest.mark.parametrize("schedule", ["one_shot", "gradual", "rewind", "late"])
def test_every_artifact_stands_in_the_summary_under_every_schedule(run_fake, tmp_path, schedule):
    fake = FakeStages(shares=(1.02, 0.98), losses=(0.1, 0.2))
    summary = run_fake(fake, overrides={"prune.schedule": schedule})
    assert describe(summary) == [(1.02, 0.1, 10, False), (0.98, 0.2, 20, True)]
    missed, kept = summary.artifacts
    assert missed.reason == "it misses the target, and another artifact meets it"
    assert not missed.met and kept.met and missed.speedup == summary.speedup
    assert kept.candidate.kept_units == summary.kept_units
    assert missed.candidate.kept_units != summary.kept_units
    assert load_summary(tmp_path / "r") == summary


def test_an_artifact_whose_proof_failed_stands_there_with_its_proof(run_fake):
    summary = run_fake(FakeStages(shares=(1.02, 0.98), unproved=(1,)))
    assert describe(summary) == [(0.98, 0.1, 20, True), (None, None, 10, False)]
    assert "its proof failed: vision: masked == sliced" in summary.artifacts[1].reason


@pytest.mark.parametrize("calls_before", range(1, 10))
@pytest.mark.examples(4)
def test_wherever_a_run_is_killed_its_artifacts_are_told_once(run_fake, calls_before):
    class Killed(FakeStages):
        def _begin(self, stage):
            if len(self.calls) == calls_before:
                raise KeyboardInterrupt(stage)
            super()._begin(stage)

    fake = Killed(shares=(1.02, 0.98))
    with pytest.raises(KeyboardInterrupt):
        run_fake(fake)
    summary = run_fake(FakeStages(shares=fake.shares, artifacts=fake.artifacts))
    assert describe(summary) == [(1.02, 0.1, 10, False), (0.98, 0.1, 20, True)]


def test_a_finished_run_keeps_them_when_it_is_given_again(run_fake):
    first = run_fake(FakeStages(shares=(1.02, 0.98)))
    assert run_fake(FakeStages(shares=(0.5,))).artifacts == first.artifacts


def test_a_longer_search_adds_its_artifact(run_fake):
    few = {"search.trials": 1, "search.max_artifacts": 1}
    run_fake(FakeStages(shares=(0.97,)), overrides=few)
    more = FakeStages(shares=(0.97, 0.99), losses=(0.1, 0.05), artifacts=1)
    summary = run_fake(more, overrides={**few, "search.trials": 9})
    assert describe(summary) == [(0.97, 0.1, 10, False), (0.99, 0.05, 20, True)]
    assert "lower choosing loss (0.050 for 0.100)" in summary.artifacts[0].reason


def test_several_targets_have_their_own(run_fake):
    fake = FakeStages(shares=(1.02, 0.98, 0.97))
    summaries = run_fake(fake, overrides={"target": "1.2x,1.5x"}, several_targets=True)
    assert [len(summary.artifacts) for summary in summaries] == [2, 1]


def test_a_policy_of_its_own_is_named_as_the_reason(run_fake):
    prefer_slower = RunPolicy(
        is_better=lambda one, other: one.compressed.latency_ms.p50 > other.compressed.latency_ms.p50
    )
    summary = run_fake(FakeStages(shares=(1.02, 0.98)), policy=prefer_slower)
    assert [record.is_kept for record in summary.artifacts] == [True, False]
    assert summary.artifacts[1].reason == "the policy of the run prefers another artifact"


def test_the_reason_names_what_the_other_one_lacks():
    lower, higher = make_summary(validation_losses=(0.1,)), make_summary(validation_losses=(0.2,))
    assert explain_choice(lower, higher) == (
        "another artifact has the lower choosing loss (0.100 for 0.200), "
        "and their latencies can't be told apart"
    )


def test_a_structure_is_described_by_precision_units_and_drops():
    blocks = make_summary().blocks
    kept = {**KEPT_UNITS, "vision": {"0.attention": 0, "0.ffn": 16}}
    texts = describe_structure(Candidate(kept_units=kept, precision={"vision": "int8"}), blocks)
    assert texts == {
        "vision": "int8; 0.ffn 16/32; dropped: 0.attention",
        "captioner": "fp32; 0.cross_attention 4/4",
    }


def make_records():
    """A kept artifact, one that was not, and one whose proof failed."""
    steps = DecodeSteps(dense=8.0, compressed=8.4, ratio=0.51, fitted_ratio=0.5)
    writing = FreeWriting(latency_factor=1.02, margin=0.01, nodes={"captioner": steps})
    candidate = Candidate(kept_units=KEPT_UNITS, precision={"vision": "int8", "captioner": "fp32"})
    fields = {"candidate": candidate, "trained_steps": 220}
    missed = ArtifactRecord(
        identity="a",
        loss=0.175,
        target_share=1.023,
        margin=0.012,
        speedup=1.96,
        reason="it misses the target, and another artifact meets it",
        writing=writing,
        **fields,
    )
    kept = ArtifactRecord(
        identity="b",
        loss=0.181,
        target_share=0.96,
        speedup=2.08,
        met=True,
        is_kept=True,
        writing=writing,
        **fields,
    )
    unproved = ArtifactRecord(
        identity="c", loss=None, reason="its proof failed: vision: torch == onnx", **fields
    )
    return missed, kept, unproved


def test_the_report_shows_every_artifact(tmp_path):
    records = make_records()
    summary = make_summary(artifacts=records, writing=records[0].writing, latency_margin=0.012)
    page = write_report(summary, tmp_path)
    html, markdown = page.read_text(), page.with_suffix(".md").read_text()
    for text in (html, markdown):
        assert "0.175" in text and "102.3 % ± 1.2 %" in text and "220" in text
        assert "captioner 8.0, 8.4" in text and "not kept: it misses the target" in text
        assert "its proof failed: vision: torch == onnx" in text
        assert "int8; 0.attention 2/4, 0.ffn 16/32" in text
        assert "writes 5.0% more tokens than the dense one, and a step takes 2.0% longer" in text
    assert "3 artifacts were made for this target." in html
