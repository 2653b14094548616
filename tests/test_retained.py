"""`limits.retained`: what is judged, which slower target follows a miss, and what is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_stages import FakeStages
from made_summary import make_summary

from mmcompress.cli import main
from mmcompress.errors import SpecError
from mmcompress.report.page import write_report
from mmcompress.results.records import RetainedCheck, SlowerTarget
from mmcompress.run.slower_targets import find_slower_target, slow_down_target
from mmcompress.run.warnings import list_warnings
from mmcompress.stats import (
    Latency,
    PerSampleScores,
    Quality,
    compute_quality_retained,
    estimate_quality,
    estimate_quality_retained,
)
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary

ARTIFACT = ["search", "train", "export", "evaluate", "report"]
"""What is done for the one artifact of a target."""

DENSE = Latency(p50=30.0, p95=60.0, n=9)

SHIPPED_SPEC = str(Path(__file__).resolve().parents[1] / "pipelines/clip_captioner.yaml")


@pytest.fixture()
def reach(run_fake):
    """`reach(fake, target)`: run with a limit of 98 % of the dense quality."""

    def run(fake, target="3x", *, limit=0.98, **options):
        overrides = {"limits.retained": limit, "target": target, "search.max_artifacts": 1}
        return run_fake(fake, overrides=overrides, several_targets=True, **options)

    return run


def list_kept(summaries):
    """Return target and kept share of every result."""
    return [(summary.target.text, summary.retained.choosing.value) for summary in summaries]


@pytest.mark.parametrize(
    ("target", "slower"),
    [
        ("3x", "2.33x"),
        ("4x", "3x"),
        ("2x p95", "1.67x p95"),
        ("10ms", "12.9ms"),  # of 30 ms: 3x becomes 2.33x
        ("20ms p95", "25.7ms p95"),  # of 60 ms
        ("1.02x", "1.01x"),
        ("1.01x", None),  # no digit is left
        ("1x", None),
        ("31ms", None),  # the dense pipeline is faster
    ],
)
def test_a_slower_target_gives_up_a_third_of_the_gain(target, slower):
    assert slow_down_target(target, dense=DENSE) == slower


def test_a_miss_goes_on_with_the_next_slower_target(reach, tmp_path):
    fake = FakeStages(shares=(0.97,), retained={"3x": 0.95, "2.33x": 0.99})
    messages = []
    listener = lambda stage, message, share: messages.append(message)
    summaries = reach(fake, on_progress=listener)
    assert list_kept(summaries) == [("3x", 0.95), ("2.33x", 0.99)]
    assert fake.calls == ["prepare", *ARTIFACT, *ARTIFACT, "report"]
    assert (
        "target 3x: 95.0% of the dense quality is kept on validation pairs, 98.0% is asked for: "
        "the run goes on with 2.33x"
    ) in messages
    first, second = summaries
    [slower] = first.retained.slower
    assert (slower.target, slower.folder, slower.choosing.value) == ("2.33x", "2.33x", 0.99)
    folder = RunFolder(path=tmp_path / "r")
    # What was asked for lies in the run folder, the slower one in it.
    assert load_summary(folder.path) == first
    assert load_summary(folder.get_target_folder("2.33x").path) == second
    assert folder.get_target_folder("2.33x").has_bundle()


def test_two_slower_targets_are_tried_at_most(reach):
    fake = FakeStages(shares=(0.97,), retained={"3x": 0.9, "2.33x": 0.92, "1.89x": 0.94})
    summaries = reach(fake)
    assert list_kept(summaries) == [("3x", 0.9), ("2.33x", 0.92), ("1.89x", 0.94)]
    assert [slower.target for slower in summaries[0].retained.slower] == ["2.33x", "1.89x"]


def test_the_choosing_split_decides_and_not_the_test_split(reach):
    """The fake test split keeps two points less."""
    [summary] = reach(FakeStages(shares=(0.97,), retained={"3x": 0.98}))
    assert summary.retained.test.high < 0.98 <= summary.retained.choosing.value


def test_without_a_limit_nothing_is_judged(run_fake):
    summary = run_fake(FakeStages(shares=(0.97,)))
    assert summary.retained is None


def test_a_result_that_could_not_be_judged_ends_the_run():
    assert find_slower_target([make_summary()], dense=DENSE) is None


def test_a_finished_run_makes_none_of_its_targets_anew(reach):
    first = reach(FakeStages(shares=(0.97,), retained={"3x": 0.95}))
    again = FakeStages(shares=(0.5,))
    assert reach(again) == first
    assert again.calls == ["prepare", "report", "report"]


@pytest.mark.parametrize("calls_before", [3, 5, 6, 8, 11])
@pytest.mark.examples(3)
def test_wherever_it_is_killed_it_ends_with_the_same_targets(reach, calls_before):
    class Killed(FakeStages):
        def _begin(self, stage):
            if len(self.calls) == calls_before:
                raise KeyboardInterrupt(stage)
            super()._begin(stage)

    retained = {"3x": 0.95, "2.33x": 0.96, "1.89x": 0.99}
    fake = Killed(shares=(0.97,), retained=retained)
    with pytest.raises(KeyboardInterrupt):
        reach(fake)
    rest = FakeStages(shares=(0.97,), retained=retained, artifacts=fake.artifacts)
    summaries = reach(rest)
    assert list_kept(summaries) == [("3x", 0.95), ("2.33x", 0.96), ("1.89x", 0.99)]
    assert len(summaries[0].retained.slower) == 2
    assert fake.calls.count("train") + rest.calls.count("train") == 3


def test_another_limit_on_resume_judges_again_and_trains_nothing_twice(reach):
    reach(FakeStages(shares=(0.97,), retained={"3x": 0.95}), limit=0.9)
    stricter = FakeStages(shares=(0.97,), retained={"3x": 0.95, "2.33x": 0.99}, artifacts=1)
    summaries = reach(stricter, limit=0.98)
    assert list_kept(summaries) == [("3x", 0.95), ("2.33x", 0.99)]
    assert stricter.calls.count("train") == 1
    assert {summary.retained.limit for summary in summaries} == {0.98}


def test_several_targets_share_their_slower_ones(reach, tmp_path):
    """4x goes on with 3x, which is asked for as well; both go on with 2.33x."""
    fake = FakeStages(shares=(0.97,), retained={"4x": 0.9, "3x": 0.95, "2.33x": 0.99})
    summaries = reach(fake, "4x,3x")
    assert list_kept(summaries) == [("4x", 0.9), ("3x", 0.95), ("2.33x", 0.99)]
    assert fake.calls.count("train") == 3
    told = [[slower.target for slower in s.retained.slower] for s in summaries]
    assert told == [["3x", "2.33x"], ["2.33x"], []]
    names = json.loads(RunFolder(path=tmp_path / "r").front.read_text())
    assert sorted(names) == ["2.33x", "3x", "4x"]


def test_a_slower_target_that_fails_leaves_the_others(reach, tmp_path):
    class Failing(FakeStages):
        def fit(self, run, prepared, *, plan, tolerances):
            if run.spec.target == "3x":
                raise SpecError("no structure")
            return super().fit(run, prepared, plan=plan, tolerances=tolerances)

    with pytest.raises(SpecError, match="no structure"):
        reach(Failing(shares=(0.97,), retained={"4x": 0.9}), "4x,2x")
    folder = RunFolder(path=tmp_path / "r")
    for target in ("4x", "2x"):
        assert load_summary(folder.get_target_folder(target).path).target.text == target
    assert folder.front.exists()


@pytest.mark.very_slow
def test_a_whole_run_is_judged_on_its_validation_pairs(run_tiny, prepare_tiny, tmp_path):
    changes = {"limits.retained": 0.5, "metrics": ["agreement"]}
    folder = RunFolder(path=tmp_path / "r")
    prepare_tiny(folder.path, changes)
    # Its answers were judged by other metrics.
    folder.locate_dense_answers("test").unlink()
    summary = run_tiny(folder.path, changes)
    assert "limits.retained" not in summary.skipped, summary.skipped
    retained = summary.retained
    assert retained.limit == 0.5
    assert (retained.choosing.n, retained.test.n) == (16, 24)
    assert retained.test.value == pytest.approx(summary.quality_retained)
    assert retained.choosing.low <= retained.choosing.value <= retained.choosing.high
    assert folder.locate_dense_answers("val").exists()
    assert "val" not in summary.extra_splits


def make_scores(right, *, count=200):
    return PerSampleScores(numerators=tuple(float(i < right) for i in range(count)))


def test_the_estimate_is_the_worst_ratio_with_a_paired_interval():
    dense = {"a": make_scores(160), "b": make_scores(120)}
    compressed = {"a": make_scores(120), "b": make_scores(114)}
    retained = estimate_quality_retained(dense, compressed)
    qualities = [
        {name: estimate_quality(scores) for name, scores in side.items()}
        for side in (dense, compressed)
    ]
    assert retained.value == pytest.approx(compute_quality_retained(*qualities)) == 0.75
    assert retained.low < 0.75 < retained.high and retained.n == 200
    # Who gives the very answers of the other side keeps all, whatever inputs are drawn.
    same = estimate_quality_retained(dense, dense)
    assert (same.value, same.low, same.high) == (1, 1, 1)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        dense_right = generator.random(300) < 0.8
        kept_right = dense_right & (generator.random(300) < 0.9)
        retained = estimate_quality_retained(
            {"a": PerSampleScores(numerators=tuple(dense_right.astype(float)))},
            {"a": PerSampleScores(numerators=tuple(kept_right.astype(float)))},
        )
        hits += retained.low <= 0.9 <= retained.high
    assert 0.91 <= hits / 200 <= 0.99


def test_error_rates_and_metrics_without_a_right_answer():
    errors = lambda count: PerSampleScores(
        numerators=(float(count),) * 9, denominators=(10.0,) * 9, is_error_rate=True
    )
    never = {"a": make_scores(0, count=9)}
    retained = estimate_quality_retained({"wer": errors(2), **never}, {"wer": errors(4), **never})
    assert retained.value == pytest.approx(0.75)
    assert estimate_quality_retained(never, never).n == 0


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.985, 0.99, "it held"),
        (0.95, 0.975, "it did not hold"),
        (0.97, 0.99, "whether it held can't be told at n = 24"),
    ],
)
def test_the_test_split_says_whether_it_held_with_its_interval(low, high, verdict):
    quality = Quality(value=0.98, low=low, high=high, n=24)
    assert RetainedCheck(limit=0.98, choosing=quality, test=quality).describe_test() == verdict


def test_a_test_split_without_a_figure_says_so():
    quality = Quality(value=0.98, low=0.97, high=0.99, n=24)
    nothing = Quality(value=0, low=0, high=0, n=0)
    check = RetainedCheck(limit=0.98, choosing=quality, test=nothing)
    assert check.describe_test() == "no metric has a figure there"


def make_check(value, *, slower=()):
    choosing = Quality(value=value, low=value - 0.01, high=value + 0.01, n=16)
    test = Quality(value=0.96, low=0.95, high=0.97, n=24)
    return RetainedCheck(limit=0.98, choosing=choosing, test=test, slower=slower)


def test_lost_quality_is_told_as_a_warning():
    assert (
        "95.0% of the dense quality is kept on validation pairs, 98.0% is asked for"
        in (list_warnings(make_summary(retained=make_check(0.95)))[0])
    )
    assert (
        "but on the test split 96.0% is kept"
        in (list_warnings(make_summary(retained=make_check(0.99)))[0])
    )


def test_the_report_shows_what_is_kept_and_the_slower_targets(tmp_path):
    row = SlowerTarget(
        target="1.67x",
        folder="1.67x",
        speedup=1.69,
        met=True,
        choosing=Quality(value=0.985, low=0.98, high=0.99, n=16),
    )
    page = write_report(make_summary(retained=make_check(0.95, slower=(row,))), tmp_path)
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        plain = text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{WORD JOINER}", "")
        assert "95.0 % (94.0 – 96.0)" in plain and "98.0 %" in plain
        assert "96.0 % (95.0 – 97.0) is kept" in plain and "it did not hold" in plain
        assert "1.67x" in plain and "98.5 % (98.0 – 99.0)" in plain
    assert "Too little of the dense quality is kept" in page.read_text()


def run_command(monkeypatch, tmp_path, summaries):
    """Return what `mmcompress run` ends with when the run comes to some summaries."""
    monkeypatch.setattr(
        "mmcompress.run.run_targets.run_targets", lambda *args, **options: summaries
    )
    return CliRunner().invoke(main, ["run", SHIPPED_SPEC, "--out", str(tmp_path / "r")])


def test_a_miss_ends_with_exit_code_3_and_says_what_was_reached_where(monkeypatch, tmp_path):
    asked = make_summary(retained=make_check(0.95))
    slower = replace(
        make_summary(retained=make_check(0.985)), target=replace(asked.target, text="1.67x")
    )
    result = run_command(monkeypatch, tmp_path, (asked, slower))
    output = " ".join(result.output.split())
    assert result.exit_code == 3
    assert (
        "limits.retained: of the dense quality on validation pairs, 95.0% at 2x, 98.5% at 1.67x "
        "is kept of 98.0% asked for; each of them was written"
    ) in output
    assert "retained, validation" in output and "it did not hold" in output


def test_what_is_kept_ends_with_exit_code_0(monkeypatch, tmp_path):
    kept = make_summary(retained=make_check(0.99))
    assert run_command(monkeypatch, tmp_path, (kept,)).exit_code == 0


def test_a_limit_that_could_not_be_judged_ends_with_exit_code_3(monkeypatch, tmp_path):
    summary = make_summary(skipped={"limits.retained": "DataError: no metric"})
    result = run_command(monkeypatch, tmp_path, (summary,))
    assert result.exit_code == 3
    assert "an unknown share at 2x (DataError: no metric)" in " ".join(result.output.split())


def test_the_schema_describes_the_limit():
    result = CliRunner().invoke(main, ["schema"])
    limits = json.loads(result.output)["$defs"]["Limits"]["properties"]["retained"]
    assert "Share of the dense quality that must be kept" in limits["description"]
