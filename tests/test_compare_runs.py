"""Finished runs side by side, and what makes the command fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_summary import make_summary

from mmcompress.cli import main
from mmcompress.cli.compare_runs import list_blind_spots
from mmcompress.report.charts.run_fronts import draw_run_fronts, list_front
from mmcompress.results.records import SUMMARY_FORMAT, Bound, is_at_chance
from mmcompress.results.run_differences import (
    AllowedDifferences,
    RunDifference,
    name_devices,
)
from mmcompress.stats import PerSampleScores, Quality, SplitScores, estimate_quality
from mmcompress.storage import write_record

ROOT = Path(__file__).resolve().parents[1]


def change(summary, *, speedup=None, drop=0.0, error=None, **fields):
    """A summary that is faster or slower, and whose metrics are lower by a share of the inputs."""
    quality = {}
    for name, figure in summary.compressed.quality.items():
        quality[name] = replace(figure, value=figure.value - drop)
    if error is not None:
        quality["wer"] = Quality(value=error, low=0.0, high=1.0, n=9, is_error_rate=True)
    compressed = replace(summary.compressed, quality=quality)
    return replace(summary, compressed=compressed, speedup=speedup or summary.speedup, **fields)


@pytest.fixture()
def call(tmp_path):
    """`call(runs, *options)`: the command over runs by name; returns its result as text too."""

    def call_command(runs, *options):
        folders = []
        for name, summary in runs.items():
            (tmp_path / name).mkdir(exist_ok=True)
            write_record(tmp_path / name / "summary.json", summary)
            folders.append(str(tmp_path / name))
        done = CliRunner().invoke(main, ["compare-runs", *folders, *map(str, options)])
        return done, " ".join(done.output.split())

    return call_command


REFERENCE = make_summary()


@pytest.mark.parametrize(
    ("run", "options", "code"),
    [
        (REFERENCE, ["--max-latency", "3%", "--max-drop", "0%"], 0),
        (change(REFERENCE, speedup=REFERENCE.speedup / 1.02), ["--max-latency", "+3%"], 0),
        (change(REFERENCE, speedup=REFERENCE.speedup / 1.04), ["--max-latency", "+3%"], 3),
        (change(REFERENCE, speedup=REFERENCE.speedup / 1.04), ["--max-drop", "1%"], 0),
        (change(REFERENCE, speedup=2 * REFERENCE.speedup), ["--max-latency", "0%"], 0),
        (change(REFERENCE, drop=0.004), ["--max-drop", "0.5%"], 0),
        (change(REFERENCE, drop=0.006), ["--max-drop", "0.5%"], 3),
        (change(REFERENCE, drop=0.5), ["--max-latency", "3%"], 0),
    ],
)
def test_what_is_allowed_decides_the_exit_code(call, run, options, code):
    done, text = call({"old": REFERENCE, "new": run}, *options)
    assert done.exit_code == code, text
    assert (" allowed" in text) == (code == 3)


def test_what_may_be_chance_is_told_with_its_margin(call):
    reference = change(REFERENCE, latency_margin=0.003)
    slower = change(reference, speedup=reference.speedup / 1.04, latency_margin=0.004)
    told = call({"old": reference, "new": slower}, "--max-latency", "3%")[1]
    assert "+4.0% ± 0.5" in told and "may be chance" not in told
    told = call({"old": reference, "new": slower}, "--max-latency", "3.8%")[1]
    assert "at most +3.8% is allowed (may be chance: give or take 0.5 %)" in told
    wide = Quality(value=0.5, low=0.47, high=0.53, n=9)
    narrow = Quality(value=0.46, low=0.42, high=0.50, n=9)
    figures = [
        replace(REFERENCE, compressed=replace(REFERENCE.compressed, quality={"r1": quality}))
        for quality in (wide, narrow)
    ]
    told = call({"old": figures[0], "new": figures[1]}, "--max-drop", "1%")[1]
    # A drop of 4 points, 3 more than is allowed; both figures together may be off by 5.
    assert "4.0 ± 5.0 points" in told and "give or take 5.0 points" in told


def test_a_run_that_missed_its_own_target_is_named(call):
    bound = Bound(kind="size", value=21.0, limit=20.0, unit="MB")
    target = replace(REFERENCE.target, met=False, exceeded_bounds=(bound,))
    done, text = call({"old": REFERENCE, "new": replace(REFERENCE, target=target)})
    assert done.exit_code == 0 and "not met" in text
    assert f"new: {bound.describe_miss()}" in text


def test_more_errors_are_a_drop(call):
    runs = {"old": change(REFERENCE, error=0.10), "new": change(REFERENCE, error=0.12)}
    assert call(runs, "--max-drop", "1%")[0].exit_code == 3
    assert call(dict(reversed(runs.items())), "--max-drop", "1%")[0].exit_code == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (change(REFERENCE, pipeline="another"), "is of the pipeline 'another'"),
        (
            replace(REFERENCE, compressed=replace(REFERENCE.compressed, quality={})),
            "it is judged by nothing",
        ),
    ],
)
def test_runs_that_can_not_be_compared_are_refused(call, other, message):
    done, text = call({"old": REFERENCE, "new": other})
    assert done.exit_code == 2 and message in text


def test_one_run_and_wrong_shares_are_refused(call, tmp_path):
    assert call({"old": REFERENCE})[0].exit_code == 2
    assert "expected a percentage" in call({"a": REFERENCE, "b": REFERENCE}, "--max-drop", "1")[1]
    done = CliRunner().invoke(main, ["compare-runs", str(tmp_path / "no"), str(tmp_path / "nor")])
    assert done.exit_code == 2 and "there is no such folder" in " ".join(done.output.split())


def test_milliseconds_of_two_devices_have_a_column_each(call, tmp_path):
    other = replace(REFERENCE, device="another", cpu={**REFERENCE.cpu, "name": "Slow One"})
    runs = {"old": REFERENCE, "new": other}
    done, _ = call(runs, "--out", tmp_path / "page", "--summary", tmp_path / "ci.md")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page" / "compare_runs.html").read_text()
    table = (tmp_path / "page" / "compare_runs.md").read_text()
    assert "latency p50 on Slow One" in page and page.count("<th") == table.count(
        "<th"
    ) + page.count("<th")
    rows = [line for line in table.splitlines() if line.startswith("| ") and "met" in line]
    columns = len(rows[0].split("|"))
    assert columns == len(rows[1].split("|"))
    assert rows[0].split("|")[-2].strip() == "–" and rows[1].split("|")[-3].strip() == "–"
    assert (tmp_path / "ci.md").read_text() == table
    call(runs, "--summary", tmp_path / "ci.md")
    assert (tmp_path / "ci.md").read_text() == 2 * table


def test_two_devices_of_one_name_are_told_apart():
    runs = {"a": REFERENCE, "b": replace(REFERENCE, device="another")}
    names = list(name_devices(runs).values())
    assert len(set(names)) == 2 and names[1].startswith(names[0])


def test_a_front_holds_what_no_other_trial_beats():
    front = list_front(REFERENCE)
    dense_ms = REFERENCE.baseline.latency_ms.p50
    for share, loss in front:
        beaten = [
            trial
            for trial in REFERENCE.trials
            if trial.latency_ms / dense_ms <= share and trial.loss < loss
        ]
        assert not beaten
    assert [share for share, _ in front] == sorted(share for share, _ in front)
    assert "<svg" in draw_run_fronts({"a": REFERENCE, "b": REFERENCE})
    assert draw_run_fronts({"a": replace(REFERENCE, trials=())}) == ""


def test_limits_below_the_noise_and_unknown_quality_are_warned_of():
    guessed = {"image_to_text_r1": Quality(value=0.1, low=0.0, high=0.4, n=9)}
    first = make_summary()
    side = replace(first.baseline, quality=guessed)
    runs = {"a": first, "b": replace(first, baseline=side)}
    difference = RunDifference(
        latency=0.01,
        latency_margin=0.075,
        drops={"m": 0.0},
        drop_margins={"m": 0.2},
        problems=(),
    )
    told = list_blind_spots(
        runs, {"b": difference}, allowed=AllowedDifferences(latency=0.03, drop=0.01)
    )
    assert len(told) == 3
    assert "known to ± 7.5% only" in told[0] and "± 20.0 points" in told[1]
    assert told[2].startswith("b: its quality is undetermined")
    assert list_blind_spots({"a": first}, {}, allowed=AllowedDifferences()) == []


def test_what_lies_far_from_a_limit_is_not_decided_by_chance():
    far = RunDifference(
        latency=-0.508,
        latency_margin=0.041,
        drops={"m": 0.172},
        drop_margins={"m": 0.028},
        problems=(),
    )
    allowed = AllowedDifferences(latency=0.03, drop=0.005)
    assert list_blind_spots({"a": REFERENCE}, {"b": far}, allowed=allowed) == []


def test_the_file_for_ci_says_first_whether_the_limits_hold(call, tmp_path):
    slower = change(REFERENCE, speedup=REFERENCE.speedup / 1.1)
    for name, run, verdict in (("good", REFERENCE, "**Passed**"), ("bad", slower, "**Failed**")):
        file = tmp_path / f"{name}.md"
        call({"old": REFERENCE, name: run}, "--max-latency", "3%", "--summary", file)
        assert file.read_text(encoding="utf-8").startswith(f"{verdict} (latency +3 %)")
    assert "at most +3.0% is allowed" in (tmp_path / "bad.md").read_text(encoding="utf-8")


def test_a_file_that_can_not_be_written_is_told_before_anything(call, tmp_path):
    place = tmp_path / "no" / "ci.md"
    done, text = call({"old": REFERENCE, "new": REFERENCE}, "--summary", place)
    assert done.exit_code == 2 and "can't be written" in text and "speedup" not in text


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"data": {"kind": "folder", "options": {"path": "/there"}}}, ""),
        ({"data": {"kind": "folder", "options": {"count": 70}}}, "its data are of another kind"),
        ({"data": {"kind": "emoji_scenes", "options": {}}}, "its data are of another kind"),
        ({"effort": "quick"}, "its effort is quick, not normal"),
    ],
)
def test_unlike_runs_are_compared_with_a_warning(call, settings, warning):
    data = {"kind": "folder", "options": {"path": "/here"}}
    first = replace(REFERENCE, settings={"data": data, "effort": "normal"})
    run = replace(first, settings={**first.settings, **settings})
    done, text = call({"old": first, "new": run})
    assert done.exit_code == 0
    assert ("that may be what makes it differ" in text) == bool(warning) and warning in text


def test_a_summary_of_a_later_format_is_refused(call, tmp_path):
    later = replace(REFERENCE, format=SUMMARY_FORMAT + 1)
    done, text = call({"old": REFERENCE, "new": later})
    assert done.exit_code == 2 and f"reads formats up to {SUMMARY_FORMAT}" in text
    file = str(tmp_path / "old" / "summary.json")
    done = CliRunner().invoke(main, ["compare-runs", file, str(tmp_path / "old")])
    assert done.exit_code == 2 and "name the folder that it lies in" in " ".join(
        done.output.split()
    )


@pytest.mark.parametrize(
    ("metric", "value", "low", "count", "guesses"),
    [
        ("image_to_text_r1", 1 / 9, 0.02, 9, True),
        ("image_to_text_r1", 0.92, 0.90, 1000, False),
        ("text_to_image_r5", 0.6, 0.45, 9, True),
        ("caption_exact_match", 0.0, 0.0, 100, True),
        ("caption_exact_match", 0.1, 0.05, 100, False),
    ],
)
def test_figures_of_guessing_are_known(metric, value, low, count, guesses):
    quality = Quality(value=value, low=low, high=1.0, n=count)
    assert is_at_chance(metric, quality) is guesses


def test_the_table_is_given_as_json(call):
    slower = change(REFERENCE, speedup=REFERENCE.speedup / 1.1, drop=0.02)
    done, _ = call({"old": REFERENCE, "new": slower}, "--max-latency", "3%", "--json")
    assert done.exit_code == 3
    facts = json.loads(done.stdout)
    assert facts["passed"] is False and facts["warnings"] == []
    old, new = facts["runs"].values()
    assert old["met"] and old["speedup"] == REFERENCE.speedup and "problems" not in old
    assert new["latency_difference"] == pytest.approx(0.1) and not new["is_paired"]
    assert max(figure["drop"] for figure in new["drops"].values()) == pytest.approx(0.02)
    assert len(new["problems"]) == 1
    page = (ROOT / "docs" / "reference" / "json_output.md").read_text(encoding="utf-8")
    for key in (*facts, *old, *new, "drop", "margin"):
        assert f"`{key}`" in page, key


def write_scores(folder, dense, compressed):
    """Write which of some inputs both sides of a run got right."""
    scores = SplitScores(
        baseline={"r1": PerSampleScores(numerators=dense)},
        compressed={"r1": PerSampleScores(numerators=compressed)},
    )
    folder.mkdir(exist_ok=True)
    write_record(folder / "outcomes.json", scores)


def test_margins_are_paired_where_the_inputs_are_the_same(call, tmp_path):
    """Two runs that lose the same inputs differ by less than their own intervals say."""
    dense = tuple(float(i % 10 != 0) for i in range(400))
    lost = tuple(float(i % 4 != 0) for i in range(400))
    two_more = tuple(right if i not in (1, 2) else 0.0 for i, right in enumerate(lost))
    runs = {}
    for name, right in (("old", lost), ("new", two_more)):
        write_scores(tmp_path / name, dense, right)
        quality = {"r1": estimate_quality(PerSampleScores(numerators=right))}
        compressed = replace(REFERENCE.compressed, quality=quality)
        baseline = replace(REFERENCE.baseline, quality=quality)
        runs[name] = replace(REFERENCE, compressed=compressed, baseline=baseline)
    facts = json.loads(call(runs, "--json")[0].stdout)["runs"]
    new = facts[str(tmp_path / "new")]
    assert new["is_paired"]
    figure = new["drops"]["r1"]
    assert figure["drop"] == pytest.approx(0.005)
    # Two inputs of 400 differ: 1.96 * sqrt(2) / 400.
    assert figure["margin"] == pytest.approx(0.0069, rel=0.1)
    # Over other inputs the intervals of both count: about 6 points.
    write_scores(tmp_path / "new", lost, two_more)
    facts = json.loads(call(runs, "--json")[0].stdout)["runs"]
    new = facts[str(tmp_path / "new")]
    assert not new["is_paired"] and new["drops"]["r1"]["margin"] > 0.05
