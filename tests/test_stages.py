"""The order of the stages, resuming, and which artifact stays: with stages of milliseconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from fake_stages import TARGET_MS, FakeStages, read_artifact_number
from made_summary import make_trial

from mmcompress.errors import ClusterError, ProofFailed, SpecError, SplitSealed
from mmcompress.graph.structure import Candidate
from mmcompress.run.fit_structure import exclude_structures
from mmcompress.run.next_artifact import Done, plan_artifact
from mmcompress.run.run_policy import RunPolicy
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary
from mmcompress.workspace.move_artifacts import finish_interrupted_move

ARTIFACT = ["search", "train", "export", "evaluate"]
"""What is done for one artifact."""


def compute_share(summary):
    return summary.compressed.latency_ms.p50 / TARGET_MS


def read_kept_artifact(folder):
    """Return which artifact, counted from 1, each of its files is of."""
    return {
        json.loads((folder / "bundle" / "manifest.json").read_text())["name"],
        str(read_artifact_number(RunFolder(path=folder))),
    }


def test_each_stage_follows_the_one_before(run_fake):
    fake = FakeStages(shares=(0.97,))
    run_fake(fake)
    assert fake.calls == ["prepare", *ARTIFACT, "report"]


@pytest.mark.parametrize(
    ("shares", "losses", "kept"),
    [
        ((1.02, 0.98), (0.1, 0.2), 2),  # the second one meets the target
        ((1.02, 1.04), (0.2, 0.1), 1),  # both miss it, the first is faster
        ((0.90, 0.97), (0.1, 0.05), 2),  # the first leaves more than a twentieth unused
        ((0.90, 0.92), (0.1, 0.2), 1),  # the first is faster and lost less
    ],
)
def test_of_two_artifacts_the_better_one_stays(run_fake, tmp_path, shares, losses, kept):
    fake = FakeStages(shares=shares, losses=losses)
    summary = run_fake(fake)
    assert fake.calls == ["prepare", *ARTIFACT, *ARTIFACT, "report"]
    assert compute_share(summary) == shares[kept - 1]
    folder = tmp_path / "r"
    assert load_summary(folder) == summary and read_kept_artifact(folder) == {str(kept)}
    assert not (folder / "next").exists()


def test_a_finished_run_makes_nothing_anew(run_fake):
    first = run_fake(FakeStages(shares=(1.02, 1.01)))
    again = FakeStages(shares=(0.5,))
    assert run_fake(again) == first
    assert again.calls == ["prepare", "report"]


@pytest.mark.parametrize(
    ("stage", "made"),
    [
        ("search", [*ARTIFACT, *ARTIFACT]),
        ("train", ["train", "export", "evaluate", *ARTIFACT]),
        ("export", ["export", "evaluate", *ARTIFACT]),
        ("evaluate", ["export", "evaluate", *ARTIFACT]),
    ],
)
def test_a_run_that_is_killed_goes_on_where_it_was(run_fake, stage, made):
    """What lies on disk of the first artifact is not made again."""
    fake = FakeStages(shares=(1.02, 0.98), interrupt=stage)
    with pytest.raises(KeyboardInterrupt):
        run_fake(fake)
    rest = replace(fake, interrupt="", calls=[])
    assert compute_share(run_fake(rest)) == 0.98
    assert rest.calls == ["prepare", *made, "report"]


@pytest.mark.parametrize("stage", ["search", "train", "export", "evaluate"])
def test_while_another_artifact_is_made_the_best_one_stays_in_its_place(run_fake, tmp_path, stage):
    """Whoever stops a run has the finished bundle where it belongs."""

    class Killed(FakeStages):
        def _begin(self, name):
            if name == stage and self.calls.count(name) == 1:
                raise KeyboardInterrupt(name)
            super()._begin(name)

    with pytest.raises(KeyboardInterrupt):
        run_fake(Killed(shares=(1.02, 0.98)))
    folder = tmp_path / "r"
    assert compute_share(load_summary(folder)) == 1.02
    assert read_kept_artifact(folder) == {"1"}
    assert RunFolder(path=folder).has_next()


@pytest.mark.parametrize("calls_before", range(1, 10))
@pytest.mark.examples(4)
def test_wherever_a_run_is_killed_it_ends_with_the_same_artifact(run_fake, tmp_path, calls_before):
    class Killed(FakeStages):
        def _begin(self, stage):
            if len(self.calls) == calls_before:
                raise KeyboardInterrupt(stage)
            super()._begin(stage)

    fake = Killed(shares=(1.02, 0.98))
    with pytest.raises(KeyboardInterrupt):
        run_fake(fake)
    rest = FakeStages(shares=fake.shares, artifacts=fake.artifacts)
    summary = run_fake(rest)
    assert compute_share(summary) == 0.98
    assert read_kept_artifact(tmp_path / "r") == {"2"}
    # Nothing is trained twice.
    assert fake.calls.count("train") + rest.calls.count("train") == 2


def test_more_trials_on_resume_search_again(run_fake):
    few = {"search.trials": 1, "search.max_artifacts": 1}
    run_fake(FakeStages(shares=(0.97,)), overrides=few)
    more = FakeStages(shares=(0.97, 0.99), losses=(0.1, 0.05), artifacts=1)
    longer = {**few, "search.trials": 9}
    messages = []
    kept = run_fake(more, overrides=longer, on_progress=lambda *told: messages.append(told[1]))
    assert any("the search goes on, and the artifact stays" in message for message in messages)
    assert more.calls == ["prepare", *ARTIFACT, "report"] and compute_share(kept) == 0.99
    again = FakeStages(shares=(0.5,))
    assert run_fake(again, overrides=longer) == kept
    assert again.calls == ["prepare", "report"]


def test_what_more_trials_find_is_kept_only_if_it_is_better(run_fake, tmp_path):
    few = {"search.trials": 1, "search.max_artifacts": 1}
    first = run_fake(FakeStages(shares=(0.97,)), overrides=few)
    longer = {**few, "search.trials": 4}
    worse = FakeStages(shares=(0.97, 0.96), losses=(0.1, 0.3), artifacts=1)
    prefer_first = RunPolicy(is_better=lambda one, other: one == first)
    kept = run_fake(worse, overrides=longer, policy=prefer_first)
    assert replace(kept, artifacts=first.artifacts) == first
    assert [record.is_kept for record in kept.artifacts] == [True, False]
    assert "train" in worse.calls and read_kept_artifact(tmp_path / "r") == {"1"}
    assert not (tmp_path / "r" / "next").exists()
    # It has been searched, whichever artifact was kept.
    again = FakeStages(shares=(0.5,))
    assert run_fake(again, overrides=longer, policy=prefer_first) == kept
    assert again.calls == ["prepare", "report"]


def test_an_artifact_of_fewer_trials_is_no_result_of_a_run_that_was_cut_off(run_fake, tmp_path):
    """Cut off between the new search and the new artifact."""
    few = {"search.trials": 2, "search.max_artifacts": 1}
    run_fake(FakeStages(shares=(0.97,)), overrides=few)
    longer = {**few, "search.trials": 4}
    killed = FakeStages(shares=(0.97, 0.98), losses=(0.1, 0.05), artifacts=1, interrupt="train")
    with pytest.raises(KeyboardInterrupt):
        run_fake(killed, overrides=longer)
    assert killed.calls == ["prepare", "search"]
    # The earlier one stays where it was, and is not the end of the run.
    assert compute_share(load_summary(tmp_path / "r")) == 0.97
    assert not RunFolder(path=tmp_path / "r").is_finished()
    rest = replace(killed, interrupt="", calls=[])
    assert compute_share(run_fake(rest, overrides=longer)) == 0.98
    assert rest.calls == ["prepare", *ARTIFACT[1:], "report"]


def test_a_policy_may_ask_for_a_further_artifact(run_fake):
    def make_three(history, limits):
        return plan_artifact(history, limits) if len(history) < 3 else Done(reason="three are made")

    fake = FakeStages(shares=(0.97, 0.98, 0.99), losses=(0.3, 0.1, 0.2))
    summary = run_fake(fake, policy=RunPolicy(next_step=make_three))
    assert fake.calls == ["prepare", *ARTIFACT, *ARTIFACT, *ARTIFACT, "report"]
    assert summary.validation_losses[-1] == 0.1


def test_targets_share_what_is_prepared_and_have_folders_of_their_own(run_fake, tmp_path):
    fake = FakeStages(shares=(0.97,))
    changes = {"target": "1.05x, 1.2x p95"}
    summaries = run_fake(fake, overrides=changes, several_targets=True)
    assert fake.calls == ["prepare", *ARTIFACT, "report", *ARTIFACT, "report"]
    assert [summary.target.text for summary in summaries] == ["1.05x", "1.2x p95"]
    for name in ("1.05x", "1.2x-p95"):
        made = {path.name for path in (tmp_path / "r" / name).iterdir()}
        assert {"bundle", "report.html", "summary.json", "weights"} <= made
    front = json.loads((tmp_path / "r" / "front.json").read_text())
    assert front["1.05x"]["speedup"] == pytest.approx(summaries[0].speedup)
    assert (tmp_path / "r" / "front.html").exists()
    with pytest.raises(SpecError, match="run_targets"):
        run_fake(fake, overrides=changes)


@pytest.mark.parametrize(
    ("error", "reached"), [(ProofFailed, ["1.1x", "1.3x"]), (ClusterError, ["1.1x"])]
)
def test_a_target_that_goes_wrong_costs_the_others_nothing(run_fake, tmp_path, error, reached):
    """An error of the cluster ends the run: the others would end the same way."""

    class OneFails(FakeStages):
        def fit(self, run, prepared, *, plan, tolerances):
            if run.spec.target == "1.2x":
                raise error("went wrong")
            return super().fit(run, prepared, plan=plan, tolerances=tolerances)

    messages = []
    with pytest.raises(error, match="went wrong"):
        run_fake(
            OneFails(shares=(0.97,)),
            overrides={"target": "1.1x,1.2x,1.3x"},
            several_targets=True,
            on_progress=lambda stage, message, share: messages.append(message),
        )
    assert "target 1.2x: went wrong" in messages
    finished = sorted(path.parent.name for path in (tmp_path / "r").glob("*/summary.json"))
    assert finished == reached
    assert (tmp_path / "r" / "front.json").exists() == (len(reached) > 1)


def list_unproved(folder):
    """Return what every set-aside artifact was, by its folder."""
    return {
        record.parent.name: str(read_artifact_number(RunFolder(path=record.parent)))
        for record in (folder / "unproved").glob("*/failed_proof.json")
    }


def test_another_structure_is_made_where_a_proof_fails(run_fake, tmp_path):
    messages = []
    fake = FakeStages(shares=(0.97,), unproved=(1,))
    summary = run_fake(fake, on_progress=lambda stage, message, share: messages.append(message))
    assert fake.calls == ["prepare", "search", "train", *ARTIFACT, "report"]
    assert summary.kept_units == {"vision": {"0.ffn": 1}}
    assert list_unproved(tmp_path / "r") == {"1": "1"}
    assert fake.excluded[0] == () and len(fake.excluded[1]) == 1
    assert any("masked == sliced" in message and "0.ffn" in message for message in messages)


def test_three_failed_proofs_end_a_run_and_resuming_makes_others(run_fake, tmp_path):
    fake = FakeStages(shares=(0.97,), unproved=(1, 2, 3))
    with pytest.raises(ProofFailed, match=r"proofs of 3 structures failed .* --resume tries other"):
        run_fake(fake)
    assert fake.calls == ["prepare", *["search", "train"] * 3]
    assert list_unproved(tmp_path / "r") == {"1": "1", "2": "2", "3": "3"}
    rest = replace(fake, calls=[], excluded=[])
    assert run_fake(rest).kept_units == {"vision": {"0.ffn": 3}}
    assert rest.calls == ["prepare", *ARTIFACT, "report"] and len(rest.excluded[0]) == 3


def test_a_proved_artifact_stays_where_the_proof_of_a_further_one_fails(run_fake, tmp_path):
    fake = FakeStages(shares=(1.02,), unproved=(2,))
    summary = run_fake(fake)
    assert compute_share(summary) == 1.02 and load_summary(tmp_path / "r") == summary
    assert fake.calls == ["prepare", *ARTIFACT, "search", "train", "report"]
    assert read_kept_artifact(tmp_path / "r") == {"1"}
    assert list_unproved(tmp_path / "r") == {"1": "2"}
    assert not (tmp_path / "r" / "next").exists()


def test_a_move_of_an_unproved_artifact_that_was_cut_off_is_completed(run_fake, tmp_path):
    fake = FakeStages(shares=(0.97,), unproved=(1,), interrupt="report")
    with pytest.raises(KeyboardInterrupt):
        run_fake(fake)
    folder = RunFolder(path=tmp_path / "r")
    # As it lies there when only the weights have been moved.
    (folder.unproved / "1" / "failed_proof.json").rename(folder.failed_proof)
    shutil.rmtree(folder.bundle)
    shutil.rmtree(folder.weights)
    (folder.unproved / "1" / "fitted.json").rename(folder.fitted)
    finish_interrupted_move(folder)
    assert list_unproved(tmp_path / "r") == {"1": "1"}
    assert not folder.failed_proof.exists() and not folder.fitted.exists()


def test_proposals_leave_excluded_structures_out():
    def propose(predictor, budget_ms, attempt):
        return replace(
            make_trial(attempt, latency_ms=budget_ms, loss=0.0),
            candidate=Candidate(kept_units={"n": {"b": round(budget_ms)}}, precision={"n": "fp32"}),
        )

    first = propose(None, 100.0, 0).candidate.make_key()
    second = propose(None, 99.0, 0).candidate.make_key()
    other = exclude_structures(propose, (first, second))
    assert other(None, 100.0, attempt=0).candidate.kept_units["n"]["b"] == 98
    assert exclude_structures(propose, ())(None, 100.0, attempt=0).candidate.make_key() == first
    nothing_else = exclude_structures(lambda *args, **_: propose(None, 100.0, 0), (first,))
    assert nothing_else(None, 100.0, attempt=0) is None


def test_a_report_that_cannot_be_written_costs_nothing(run_fake, tmp_path):
    class NoReport(FakeStages):
        def report(self, summary, folder):
            raise OSError("no space left on device")

    messages = []
    fake = NoReport(shares=(0.97,))
    summary = run_fake(fake, on_progress=lambda stage, message, share: messages.append(message))
    assert load_summary(tmp_path / "r") == summary
    assert any(
        "no space left" in message and "mmcompress report" in message for message in messages
    )


@pytest.mark.parametrize("stage", ["prepare", "fit", "compress"])
def test_a_stage_that_chooses_can_not_see_the_test_split(run_fake, stage):
    """Nor can it see a further split that the result is reported on."""

    class Peeking(FakeStages):
        def _peek(self, run):
            run.data.load("train", 4)
            run.data.load("val", 4)
            for split in ("test", "test_style"):
                with pytest.raises(SplitSealed, match=f"'{split}' is sealed"):
                    run.data.load(split, 1)
            run.data.load("test", 1)

        def prepare(self, run):
            return self._peek(run) if stage == "prepare" else super().prepare(run)

        def fit(self, run, prepared, *, plan, tolerances):
            if stage == "fit":
                self._peek(run)
            return super().fit(run, prepared, plan=plan, tolerances=tolerances)

        def compress(self, run, prepared, *, fitted, earlier):
            if stage == "compress":
                self._peek(run)
            return super().compress(run, prepared, fitted=fitted, earlier=earlier)

    with pytest.raises(SplitSealed):
        run_fake(Peeking(shares=(0.97,)), overrides={"data.report": ["test_style"]})


def test_the_test_split_is_sealed_again_after_each_artifact(run_fake):
    """What a first artifact shows on it can't choose the second one."""

    class Judging(FakeStages):
        def fit(self, run, prepared, *, plan, tolerances):
            with pytest.raises(SplitSealed):
                run.data.load("test", 1)
            return super().fit(run, prepared, plan=plan, tolerances=tolerances)

        def evaluate(self, run, prepared, *, fitted, compressed, measuring):
            with run.seal.open_for_judging():
                assert len(run.data.load("test", 1)) == 1
            return super().evaluate(
                run, prepared, fitted=fitted, compressed=compressed, measuring=measuring
            )

    judging = Judging(shares=(1.2, 0.98))
    run_fake(judging)
    assert judging.calls.count("evaluate") == 2
