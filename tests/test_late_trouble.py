"""Trouble after the training: a full disk, a metric or a page that fails. No work is lost by it."""

from __future__ import annotations

import errno
import json
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from fake_stages import FakeStages, read_artifact_number
from made_summary import make_quality, make_summary

from mmcompress import storage
from mmcompress.cli import lazy_group, main
from mmcompress.cli.results_table import print_summary
from mmcompress.cli.run import _require_determined_limits, _require_determined_quality
from mmcompress.data.open_dataset import open_dataset
from mmcompress.errors import (
    BundleError,
    DataError,
    DiskFull,
    LimitUndetermined,
    QualityUndetermined,
)
from mmcompress.experiments.claims import list_common_metrics
from mmcompress.graph.load_spec import load_spec
from mmcompress.metrics.answers import Answers, score_answers
from mmcompress.registry import METRICS
from mmcompress.report.comparison_pages import write_comparison, write_front
from mmcompress.report.page import write_report
from mmcompress.results.target_met import tighten_limits
from mmcompress.run import answers as asking
from mmcompress.run.answers import SplitAnswers, list_failed_metrics
from mmcompress.run.assemble import PredictedReach, build_target
from mmcompress.run.evaluate import _measure_memory, skip_failed_step
from mmcompress.run.warnings import list_warnings
from mmcompress.spec.target import parse_target
from mmcompress.stats import PerSampleScores
from mmcompress.storage import hold_room, read_record, replace_file, replace_folder, write_record
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary

CURE = "make room there and give the same command again, a run with --resume"


# A full disk.


@pytest.fixture()
def fill_disk(monkeypatch):
    """`fill_disk(n)`: the disk is full after n more files; `fill_disk(None)`: it has room again."""
    create_file = storage._create_file
    left = [None]

    def create(path):
        if left[0] is not None:
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            left[0] -= 1
        return create_file(path)

    monkeypatch.setattr(storage, "_create_file", create)

    def fill(count):
        left[0] = count

    return fill


@pytest.mark.parametrize("files", range(14))
@pytest.mark.examples(6)
def test_whenever_the_disk_is_full_the_run_goes_on_from_there(run_fake, tmp_path, fill_disk, files):
    """The third file is the last one of the folder's own records."""
    fake = FakeStages(shares=(1.02, 0.98))
    fill_disk(files)
    messages = []
    options = {"on_progress": lambda stage, message, share: messages.append(message)}
    try:
        run_fake(fake, **options)
        is_finished = True
    except DiskFull as error:
        is_finished = False
        assert "can't be written: No space left on device" in str(error) and CURE in str(error)
        assert str(tmp_path) in str(error) and error.exit_code == 2
    fill_disk(None)
    rest = FakeStages(shares=fake.shares, artifacts=fake.artifacts)
    resumes = (tmp_path / "r" / "spec.json").exists()
    if not resumes:
        for path in tmp_path.glob("r/*"):
            path.unlink()
    summary = run_fake(rest, resume=resumes)
    assert is_finished or "evaluate" in rest.calls
    assert summary.compressed.latency_ms.p50 == 0.98
    assert read_artifact_number(RunFolder(path=tmp_path / "r")) == 2
    assert fake.calls.count("train") + rest.calls.count("train") == 2


def test_a_full_disk_ends_the_run_of_several_targets(run_fake, tmp_path, fill_disk):
    class FullAtSecond(FakeStages):
        def evaluate(self, run, prepared, **options):
            if run.spec.target == "1.2x":
                fill_disk(0)
            return super().evaluate(run, prepared, **options)

    fake = FullAtSecond(shares=(0.97,))
    with pytest.raises(DiskFull, match=CURE):
        run_fake(fake, overrides={"target": "1.1x,1.2x,1.3x"}, several_targets=True)
    assert fake.calls.count("train") == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_cannot_be_written_is_named_and_leaves_everything_whole(tmp_path, error):
    record = write_record(tmp_path / "a.json", {"old": 1})
    folder = tmp_path / "bundle"
    with replace_folder(folder) as unfinished:
        (unfinished / "old").touch()
    told = pytest.raises(DiskFull, match=r"a\.json: can't be written: .*make room")
    with told, replace_file(record) as unfinished:
        unfinished.write_text("ha")
        raise error
    told = pytest.raises(DiskFull, match=r"bundle: can't be written: .*make room")
    with told, replace_folder(folder) as unfinished:
        (unfinished / "new").touch()
        raise error
    assert json.loads(record.read_text()) == {"old": 1}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "bundle", "old"]


def test_a_full_disk_is_seen_where_a_library_hides_the_number_of_its_error(tmp_path, monkeypatch):
    def write(error):
        with replace_file(tmp_path / "a"):
            raise error

    with pytest.raises(ValueError, match="3 requested"):
        write(ValueError("3 requested and 0 written"))
    monkeypatch.setattr(storage, "MIN_FREE_BYTES", 1e30)
    with pytest.raises(DiskFull, match="No space left"):
        write(ValueError("3 requested and 0 written"))
    for told in (KeyboardInterrupt(), BundleError("no such node")):
        with pytest.raises(type(told)):
            write(told)


def test_room_is_held_and_given_back(tmp_path):
    room = tmp_path / "training.room"
    with hold_room(room, 70_000):
        assert room.stat().st_blocks * 512 >= 70_000
    assert not room.exists()
    told = pytest.raises(DiskFull, match=r"training\.room: can't be written")
    with told, hold_room(room, 10**18):
        raise AssertionError("trained without room for the weights")
    assert not room.exists()


def test_a_full_disk_anywhere_is_no_traceback(monkeypatch):
    def fail(name):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    monkeypatch.setattr(lazy_group, "resolve_entry", fail)
    result = CliRunner().invoke(main, ["list", "metrics"])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert f"/tmp/x: can't be written: No space left on device; {CURE}" in result.stderr


# A metric that fails.


@pytest.fixture()
def own_metric():
    """`own_metric(score)`: register a metric of texts as `own`."""

    def register(score):
        METRICS.add("own", score, "a plug-in's", needs="final_texts", judges="a node of texts")

    yield register
    METRICS._entries.pop("own", None)


def score_alike(answers):
    """Return 1 for every input."""
    return {"own": PerSampleScores(numerators=(1.0,) * len(answers.references))}


def fail_on_compressed(answers):
    """Raise where there is a dense pipeline to compare with."""
    if answers.dense is not None:
        raise ZeroDivisionError("no word in common")
    return score_alike(answers)


ANSWERS = Answers(references=("a", "b"), texts=("a", "c"))


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (ZeroDivisionError("no word"), "ZeroDivisionError: no word"),
        (None, "TypeError: 'NoneType' object is not iterable"),
        ({"own": 0.5}, "TypeError: own: expected PerSampleScores, got float"),
        ({"own": PerSampleScores(numerators=(1.0,))}, "ValueError: own: 1 scores of 2 inputs"),
        ({"own": PerSampleScores(numerators=(1.0, float("nan")))}, "own: a score is not finite"),
        ({"own": PerSampleScores(numerators=(30.5, 2.0))}, "own: a score without a denominator"),
        (
            {"own": PerSampleScores(numerators=(1.0, 1.0), denominators=(1.0,))},
            "ValueError: own: 1 scores of 2 inputs",
        ),
    ],
)
def test_a_metric_that_fails_costs_its_own_figure(tiny, own_metric, returned, reason):
    def score(answers):
        if isinstance(returned, Exception):
            raise returned
        return returned

    own_metric(score)
    spec = load_spec(tiny / "spec.yaml", {"metrics": ["own", "caption"]})
    scoring = score_answers({"choose": ANSWERS}, spec=spec)
    assert set(scoring.scores) == {"caption_exact_match"}
    [(name, told)] = scoring.failures.items()
    assert name == "own.choose" and reason in told


def test_figures_of_numpy_can_be_written(tiny, own_metric, tmp_path):
    import numpy as np

    own_metric(lambda answers: {"own": PerSampleScores(numerators=np.ones(2, np.float32))})
    spec = load_spec(tiny / "spec.yaml", {"metrics": ["own"]})
    scoring = score_answers({"choose": ANSWERS}, spec=spec)
    record = write_record(tmp_path / "a.json", SplitAnswers(scores=scoring.scores))
    assert read_record(SplitAnswers, record).scores["own"].numerators == (1.0, 1.0)


def test_dense_answers_are_asked_again_only_where_a_metric_failed(
    tiny, own_metric, tmp_path, monkeypatch
):
    """On disk is what does not depend on the metric; once it is mended, it is judged again."""
    from mmcompress.workspace.context import open_run

    asked = []

    def ask(run, bundles, *, pairs, split):
        asked.append(list(bundles))
        answers = Answers(references=pairs.texts, texts=pairs.texts)
        return {side: {"choose": answers} for side in bundles}

    monkeypatch.setattr(asking, "_ask_bundles", ask)

    def fail(answers):
        raise ZeroDivisionError("no word in common")

    own_metric(fail)
    run = open_run(tiny / "spec.yaml", tmp_path / "r", overrides={"metrics": ["caption", "own"]})
    run.seal.is_open = True
    sides = asking.answer_split(run, "test")
    assert list(sides["compressed"].scores) == ["caption_exact_match"]
    METRICS._entries.pop("own")
    own_metric(fail_on_compressed)
    sides = asking.answer_split(run, "test")
    assert list(sides["baseline"].scores) == ["caption_exact_match"]
    assert list_failed_metrics({"test": sides}) == {
        "metric own.choose on test": "compressed: ZeroDivisionError: no word in common"
    }
    METRICS._entries.pop("own")
    own_metric(score_alike)
    sides = asking.answer_split(run, "test")
    assert list(sides["compressed"].scores) == ["caption_exact_match", "own"]
    assert list_failed_metrics({"test": sides}) == {}
    both = ["baseline", "compressed"]
    assert asked == [both, both, ["compressed"]]


def test_a_metric_is_tried_before_the_work(tiny, own_metric, run_folder):
    def fail(answers):
        raise ZeroDivisionError(f"no word in common of {len(answers.references)}")

    messages = []
    own_metric(fail)
    spec = load_spec(tiny / "spec.yaml", {"metrics": ["caption", "own"]})
    run = SimpleNamespace(
        spec=spec,
        data=open_dataset(spec.data),
        on_progress=lambda stage, message, share: messages.append((stage, message)),
    )
    asking.try_metrics(run, run_folder / "baseline")
    [(stage, message)] = messages
    assert stage == "check" and message.startswith(
        f"the metric own.choose fails on {asking.METRIC_TRIAL_PAIRS} answers of the dense pipeline: "
        "ZeroDivisionError: no word"
    )


def test_a_step_that_can_be_skipped_is_told_and_a_full_disk_is_not_skipped(run_fake, tmp_path):
    messages = []

    class Run:
        def on_progress(self, stage, message, share):
            messages.append(message)

    skipped = {}
    with skip_failed_step(Run(), "split rare", skipped=skipped):
        raise DataError("a.png: can't be read")
    assert skipped == {"split rare": "DataError: a.png: can't be read"}
    assert messages == ["split rare is skipped: DataError: a.png: can't be read"]
    with pytest.raises(DiskFull), skip_failed_step(Run(), "split rare", skipped=skipped):
        raise DiskFull("a")


REASON = {"metric own.choose on test": "compressed: ZeroDivisionError: no word in common"}


def test_a_skipped_metric_is_told_in_summary_and_report(tmp_path, capsys):
    summary = make_summary(skipped=REASON)
    summary = replace(summary, warnings=list_warnings(summary))
    told = "metric own.choose on test has no figure: compressed: ZeroDivisionError: no word"
    assert summary.warnings[0].startswith(told) and "--resume" in summary.warnings[0]
    assert summary.determined_quality == summary.quality_retained
    _require_determined_quality([summary])
    write_report(summary, tmp_path)
    for name in ("report.md", "report.html"):
        assert told in (tmp_path / name).read_text(encoding="utf-8")
    print_summary(summary)
    assert "97.0% of the quality retained" in capsys.readouterr().out
    write_record(RunFolder(path=tmp_path).summary, summary)
    assert load_summary(tmp_path) == summary


def test_quality_without_any_figure_is_undetermined(tmp_path, capsys):
    made = make_summary()
    summary = make_summary(
        skipped=REASON,
        baseline=replace(made.baseline, quality={}),
        compressed=replace(made.compressed, quality={}),
        quality_retained=0.0,
    )
    with pytest.raises(QualityUndetermined, match="no metric gave a figure") as caught:
        _require_determined_quality([summary])
    assert caught.value.exit_code == 3
    summary = replace(summary, warnings=list_warnings(summary))
    write_report(summary, tmp_path)
    for name in ("report.md", "report.html"):
        assert "undetermined" in (tmp_path / name).read_text(encoding="utf-8")
    print_summary(summary)
    assert "quality undetermined" in capsys.readouterr().out


def test_a_memory_limit_whose_measurement_fails_is_undetermined(tmp_path, capsys, tiny):
    class Bench:
        def measure_memory_mb(self, bundle):
            raise subprocess.CalledProcessError(-9, "probe")

    spec = load_spec(tiny / "spec.yaml", {"limits.memory_mb": 100})
    messages = []
    run = SimpleNamespace(
        spec=spec, bench=Bench(), on_progress=lambda stage, message, share: messages.append(message)
    )
    skipped = {}
    assert _measure_memory(run, tmp_path / "bundle", skipped=skipped) == 0.0
    assert "died with <Signals.SIGKILL: 9>" in skipped["memory of bundle"]
    [told] = messages
    assert told.startswith("memory of bundle is skipped: CalledProcessError")

    made = make_summary()
    side = replace(made.compressed, memory_mb=0.0)
    reach = PredictedReach(floor_ms=1, fixed_ms=1, fixed_ms_by_node={}, lowest_reachable=())
    dense = made.baseline.latency_ms
    build = partial(
        build_target, spec, goal=parse_target(spec.target), dense=dense, reach=reach, pace=1.0
    )
    target = build(compressed=side)
    assert target.undetermined_limits == ("memory",)
    assert not any(bound.kind == "memory" for bound in target.exceeded_bounds)
    assert tighten_limits(spec.limits, spec.limits, side=side) == spec.limits
    measured = build(compressed=made.compressed)
    assert measured.undetermined_limits == ()
    assert any(bound.kind == "memory" for bound in measured.exceeded_bounds)

    target = replace(made.target, undetermined_limits=("memory",))
    summary = make_summary(target=target, compressed=side, skipped=skipped)
    summary = replace(summary, warnings=list_warnings(summary))
    with pytest.raises(LimitUndetermined, match="the limit of memory is undetermined") as caught:
        _require_determined_limits([summary])
    assert caught.value.exit_code == 3
    write_report(summary, tmp_path)
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert "the limit of memory is undetermined" in page
    print_summary(summary)
    assert "limit of memory undetermined" in " ".join(capsys.readouterr().out.split())


def test_a_figure_that_one_of_several_runs_lacks_is_a_dash(tmp_path):
    made = make_summary()
    without = replace(made.compressed, quality={"wer": make_quality(0.5, is_error_rate=True)})
    summaries = {"2x": made, "3x": replace(made, compressed=without)}
    folder = RunFolder(path=tmp_path)
    write_front(summaries, folder)
    write_comparison(summaries, dict.fromkeys(summaries, ""), claims=(), folder=folder)
    for page in (folder.front_page, folder.comparison_page):
        assert "| – | 50.0 %" in page.with_suffix(".md").read_text(encoding="utf-8")
    scores = {"wer": PerSampleScores(numerators=(1.0,)), "own": PerSampleScores(numerators=(0.0,))}
    assert list_common_metrics([scores, {"wer": scores["wer"]}]) == ["wer"]
    assert list_common_metrics([scores, {}]) == []


def test_a_run_that_skipped_something_judges_again_on_resume(run_fake, tmp_path):
    class OneSkips(FakeStages):
        def evaluate(self, run, prepared, **options):
            summary = super().evaluate(run, prepared, **options)
            summary = replace(summary, skipped={} if "report" in self.calls else REASON)
            write_record(run.folder.summary, summary)
            return summary

    fake = OneSkips(shares=(0.97,))
    assert run_fake(fake).skipped == REASON
    again = OneSkips(shares=(0.97,), calls=["report"])
    assert run_fake(again).skipped == {}
    assert again.calls == ["report", "prepare", "export", "evaluate", "report"]
    last = FakeStages(shares=(0.97,))
    run_fake(last)
    assert last.calls == ["prepare", "report"]


# A page that fails.


def test_a_front_that_cannot_be_drawn_costs_nothing(run_fake):
    class BrokenFront(FakeStages):
        def report_front(self, summaries, folder):
            raise RuntimeError("the template is broken")

    messages = []
    summaries = run_fake(
        BrokenFront(shares=(0.97,)),
        overrides={"target": "1.1x,1.2x"},
        several_targets=True,
        on_progress=lambda stage, message, share: messages.append(message),
    )
    assert [summary.target.text for summary in summaries] == ["1.1x", "1.2x"]
    [told] = [message for message in messages if "the template is broken" in message]
    assert "front.html could not be written" in told and "--resume" in told


@pytest.mark.slow
def test_a_template_that_raises_costs_nothing_and_the_command_redraws_it(
    run_fake, tmp_path, monkeypatch
):
    from mmcompress.report import fill_templates
    from mmcompress.report.page import write_report as write_real_report

    templates = tmp_path / "templates"
    templates.mkdir()
    for path in Path(fill_templates.TEMPLATE_FOLDER).iterdir():
        (templates / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (templates / "report.md").write_text("{{ summary.no_such_figure }}")
    monkeypatch.setattr(fill_templates, "TEMPLATE_FOLDER", templates)

    class RealReport(FakeStages):
        def report(self, summary, folder):
            return write_real_report(summary, folder)

    messages = []
    summary = run_fake(
        RealReport(shares=(0.97,)),
        on_progress=lambda stage, message, share: messages.append(message),
    )
    assert load_summary(tmp_path / "r") == summary
    [told] = [message for message in messages if "no_such_figure" in message]
    command = told.partition("`mmcompress ")[2].partition("`")[0].split()
    monkeypatch.undo()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and (tmp_path / "r" / "report.html").exists()
