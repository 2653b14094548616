"""`doctor RUN` and `clean`: what is wrong with a run folder, and what it takes on disk."""

from __future__ import annotations

import json
import shutil

import optuna
import pytest
from click.testing import CliRunner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mmcompress.cli import main
from mmcompress.run.inspect_run import inspect_run, repair_run
from mmcompress.search.study import STUDY_NAME
from mmcompress.workspace.clean import list_run_parts, measure_size
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import hold_folder


@pytest.fixture()
def run(run_folder, tmp_path):
    """A copy of the finished run."""
    return RunFolder(path=shutil.copytree(run_folder, tmp_path / "run"))


def call(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    return done, " ".join(done.output.split())


def list_files(folder):
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.path.rglob("*")
        if path.is_file()
    }


def open_journal(run):
    storage = JournalStorage(JournalFileBackend(str(run.study)))
    return optuna.load_study(study_name=STUDY_NAME, storage=storage)


def leave_a_trial_running(run):
    open_journal(run).ask()


def write_a_trial_twice(run):
    study = open_journal(run)
    first = next(t for t in study.trials if "trial" in t.user_attrs)
    study.add_trial(first)


def forget_a_constraint(run):
    study = open_journal(run)
    first = next(t for t in study.trials if "trial" in t.user_attrs)
    record = {**first.user_attrs["trial"], "number": 900}
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"trial": record}))


def tear_the_journal(run):
    run.study.write_bytes(run.study.read_bytes()[:-20])


def tear_a_record(run):
    run.profile.write_text(run.profile.read_text()[:100])


def change_a_graph(run):
    graph = next(run.bundle.rglob("*.onnx"))
    graph.write_bytes(graph.read_bytes() + b"x")


def lose_the_bundle(run):
    shutil.rmtree(run.bundle)


def tear_the_weights(run):
    run.units.write_bytes(run.units.read_bytes()[:-5])


def leave_scratch(run):
    (run.scratch / "bundle").mkdir(parents=True)
    (run.path / "summary.json.new").write_text("{")


def leave_a_bundle_unfinished(run):
    """A run was killed while it wrote the dense pipeline in int8."""
    shutil.copytree(run.bundle, run.quantized / "int8.new")
    graph = next((run.quantized / "int8.new").rglob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:100])


BREAKS = {
    leave_a_trial_running: ("study.journal", "is still running, and nobody works on it"),
    write_a_trial_twice: ("study.journal", "stands in it 2 times"),
    forget_a_constraint: ("study.journal", "has no constraint"),
    tear_the_journal: ("study.journal", "is damaged"),
    tear_a_record: ("profile.json", "can't be read"),
    change_a_graph: ("bundle", "model"),
    lose_the_bundle: ("bundle", "its bundle is not there"),
    tear_the_weights: ("weights", "can't be read"),
    leave_scratch: ("scratch", "left it unfinished"),
    leave_a_bundle_unfinished: ("int8.new", "left it unfinished"),
}
"""What breaks a folder, the part that is named, and what is said of it."""

MENDED = (
    leave_a_trial_running,
    tear_the_journal,
    tear_a_record,
    leave_scratch,
    leave_a_bundle_unfinished,
    tear_the_weights,
)
"""What a repair mends without a run."""


def test_a_finished_run_is_whole(run):
    before = list_files(run)
    done, text = call("doctor", run.path)
    assert done.exit_code == 0, text
    assert "whole" in text and list_files(run) == before


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
def test_every_fault_is_named_and_nothing_is_written(run, break_it):
    break_it(run)
    before = list_files(run)
    name, fault = BREAKS[break_it]
    findings = inspect_run(run.path)
    assert any(found.path.name == name and fault in found.fault for found in findings), findings
    done, text = call("doctor", run.path)
    assert done.exit_code == 1 and "--repair" in text
    assert list_files(run) == before


@pytest.mark.parametrize("break_it", MENDED, ids=lambda function: function.__name__)
def test_a_repair_leaves_nothing_to_find(run, break_it):
    trials = len([t for t in open_journal(run).trials if "trial" in t.user_attrs])
    break_it(run)
    told = []
    repair_run(run.path, tell=told.append)
    assert told and inspect_run(run.path) == []
    kept = [t for t in open_journal(run).trials if "trial" in t.user_attrs]
    assert len(kept) >= trials - 1


def test_what_was_set_aside_is_never_read_or_set_aside_again(run):
    """A folder that was set aside is checked by nobody: neither a bundle nor an artifact."""
    shutil.copytree(run.bundle, run.quantized / "int8.new.damaged" / "inner")
    aside = run.quantized / "int8.damaged"
    shutil.copytree(run.bundle, aside)
    (run.path / "earlier.damaged").mkdir()
    run.fitted.replace(run.path / "earlier.damaged" / run.fitted.name)
    (run.path / "earlier.damaged" / run.summary.name).write_text("{")
    for graph in aside.rglob("*.onnx"):
        graph.write_bytes(b"")
    before = list_files(run)
    repair_run(run.path, tell=print)
    assert list_files(run) == before and inspect_run(run.path) == []
    assert run.list_finished_subfolders() == []
    parts = [part for part in list_run_parts(run) if part.can_go]
    assert {part.path.name for part in parts} >= {"earlier.damaged", "rounded"}


def test_an_artifact_that_was_being_moved_is_kept(run):
    """The run was killed when the artifact lay in a folder of its own, and nowhere else."""
    unfinished = run.path / "next.best"
    unfinished.mkdir()
    for path in run.list_artifact():
        path.rename(unfinished / path.name)
    run.study.unlink()
    assert any("was being moved" in found.fault for found in inspect_run(run.path))
    repair_run(run.path, tell=lambda text: None)
    assert run.is_finished() and run.has_bundle() and not unfinished.exists()


def test_a_folder_that_somebody_works_on_is_left_alone(run, tmp_path):
    with hold_folder(run.path):
        done, text = call("doctor", run.path)
    assert done.exit_code == 2 and "works on this run" in text
    assert call("doctor", tmp_path / "nothing")[0].exit_code == 2
    assert call("doctor", "--repair")[0].exit_code == 2


def test_what_a_run_takes_is_told_and_only_what_is_made_again_goes(run):
    run.teacher_outputs.mkdir(exist_ok=True)
    (run.teacher_outputs / "draw.safetensors").write_bytes(bytes(3_000_000))
    before = measure_size(run.path)
    done, text = call("clean", run.path, "--dry-run")
    assert done.exit_code == 0 and "teacher_outputs" in text and "MB can go" in text
    assert "add --yes" in call("clean", run.path)[1]
    assert measure_size(run.path) == before
    done, text = call("clean", run.path, "--yes")
    assert done.exit_code == 0 and "MB deleted" in text
    assert measure_size(run.path) < before - 3_000_000
    assert not run.teacher_outputs.exists() and run.has_bundle() and run.units.exists()
    assert call("doctor", run.path)[0].exit_code == 0
    assert call("show", run.path)[0].exit_code == 0


def test_the_cache_is_cleaned_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path))
    assert "0.0 MB can go" in call("clean", "--cache")[1]
    tables = tmp_path / "mmcompress" / "tables"
    tables.mkdir(parents=True)
    (tables / "device.json").write_text(json.dumps({"rows": []}))
    assert call("clean", "--cache", "--yes")[0].exit_code == 0
    assert not tables.exists()
    assert call("clean")[0].exit_code == 2 and call("clean", "r", "--cache")[0].exit_code == 2


@pytest.mark.very_slow
def test_a_cleaned_run_goes_on_with_another_target(run, tiny, machine, one_artifact):
    from mmcompress.run import run_targets as workflow

    assert call("clean", run.path, "--yes")[0].exit_code == 0
    summary = workflow.run(
        tiny / "spec.yaml",
        run.path,
        overrides={"search.trials": 6},
        resume=True,
        policy=one_artifact,
        **machine,
    )
    assert summary.trials and run.has_bundle()
