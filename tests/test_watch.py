"""A run is followed from its folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mmcompress.cli import main
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import hold_folder, is_held
from mmcompress.workspace.move_artifacts import begin_next
from mmcompress.workspace.progress_log import ProgressLog, read_progress


def watch(folder, *options):
    done = CliRunner().invoke(main, ["watch", str(folder), *options])
    return done.exit_code, " ".join(done.output.split())


def watch_events(folder):
    done = CliRunner().invoke(main, ["watch", str(folder), "--json"])
    assert done.exit_code == 0
    return [json.loads(line) for line in done.output.splitlines()]


@pytest.fixture()
def folder(tmp_path):
    """A folder in which a run has told of three things."""
    heard = []
    folder = RunFolder(path=tmp_path)
    log = ProgressLog(folder, lambda *told: heard.append(told))
    log("search", "trial 1", 0.1)
    assert not folder.progress.exists()  # no run has begun here yet
    log.begin()
    log("search", "trial 2", 0.2)  # too soon after the first
    log("distill", "a message of its own", None)
    assert heard[1] == ("search", "trial 2", 0.2) and len(heard) == 3
    return folder


def test_a_log_has_a_line_of_what_is_news(folder):
    lines = [line for line, _ in read_progress(folder.progress)]
    assert [line.message for line in lines] == ["trial 1", "a message of its own"]
    assert lines[0].share == 0.1 and lines[1].share is None


def test_a_line_that_is_being_written_waits_and_a_damaged_one_is_passed_over(folder):
    with folder.progress.open("a") as log:
        log.write("{torn\n[]\n" + json.dumps({"stage": "fit"})[:-3])
    lines = list(read_progress(folder.progress))
    assert len(lines) == 2
    with folder.progress.open("a") as log:
        log.write("\n")
    offset = lines[-1][1]
    assert list(read_progress(folder.progress, offset)) == []


def test_a_run_that_goes_on_is_told(folder):
    held = "from mmcompress.workspace.hold_folder import hold_folder\nimport sys\n"
    held += f"with hold_folder({str(folder.path)!r}):\n    print('held', flush=True)\n    input()\n"
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "held\n"
        assert is_held(folder)
        code, text = watch(folder.path, "--once")
        owner.stdin.write("\n")
        owner.stdin.flush()
    # Where it is, not where it was.
    assert code == 0 and "a message of its own" in text and "trial 1" not in text
    assert "the run goes on" in text
    assert not is_held(folder)


def test_a_run_that_was_cut_off_names_the_way_on(folder):
    code, text = watch(folder.path)
    assert code == 0 and "the run was cut off; the same command with --resume goes on" in text
    events = watch_events(folder.path)
    assert [event["event"] for event in events] == ["progress", "progress", "state"]
    assert events[-1]["state"] == "cut off" and "--resume goes on" in events[-1]["message"]


def test_a_finished_run_is_told_with_its_verdict(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "r")
    code, text = watch(copy)
    assert code == 0 and "the run is finished:" in text and "is met" in text
    assert "evaluate" in text
    result, state = watch_events(copy)[-2:]
    assert result["event"] == "result" and result["met"] is True
    assert result["bundle"] == str(copy / "bundle")
    assert state["event"] == "state" and state["state"] == "finished"


def test_an_artifact_behind_which_another_one_is_made_is_not_the_end_of_a_run(run_folder, tmp_path):
    copy = RunFolder(path=tmp_path / "r")
    shutil.copytree(run_folder, copy.path)
    begin_next(copy)
    code, text = watch(copy.path)
    assert code == 0 and "finished:" not in text
    assert "the run was cut off" in text and f"lies in {copy.bundle}" in " ".join(text.split())


def test_lines_are_told_with_the_time_of_the_run(folder):
    first, second = [line for line, _ in read_progress(folder.progress)]
    later = [vars(first), {**vars(second), "unix_seconds": first.unix_seconds + 4321}]
    folder.progress.write_text("".join(json.dumps(line) + "\n" for line in later))
    assert "4321 s distill" in watch(folder.path)[1]


def test_a_folder_without_a_run_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcompress.cli.watch.MAX_WAIT_SECONDS", 0.01)
    code, _ = watch(tmp_path)
    assert code != 0
    with hold_folder(tmp_path):
        assert is_held(RunFolder(path=tmp_path))


def test_a_run_that_has_not_begun_yet_is_waited_for(tmp_path, monkeypatch):
    """Its process imports torch and loads its models before it writes a line."""
    waits = []

    def begin(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            folder = RunFolder(path=tmp_path)
            folder.write_format()
            log = ProgressLog(folder, lambda *told: None)
            log.begin()
            log("load", "two models", None)

    monkeypatch.setattr("mmcompress.cli.watch.time.sleep", begin)
    code, output = watch(tmp_path)
    assert code == 0 and "waiting up to 60 s" in output and "two models" in output
    assert len(waits) == 3


def test_a_folder_in_which_nothing_begins_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcompress.cli.watch.MAX_WAIT_SECONDS", 0.01)
    code, output = watch(tmp_path)
    assert code == 2 and "no run has begun in this folder" in output
    code, output = watch(tmp_path, "--once")
    assert code == 2 and "waiting" not in output


def test_a_folder_of_other_files_is_refused_at_once(tmp_path):
    (tmp_path / "notes.txt").write_text("no run")
    done = CliRunner().invoke(main, ["watch", str(tmp_path)])
    assert done.exit_code == 2
    assert "no run folder: it holds other files" in " ".join(done.output.split())


def test_the_doctor_names_a_missing_folder_before_it_loads_anything(tmp_path):
    done = CliRunner().invoke(main, ["doctor", str(tmp_path / "nothing")])
    assert done.exit_code == 2 and "there is no such folder" in " ".join(done.output.split())
