"""A command that uses Ray is watched: when its process dies, a line says how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mmcompress.cli import submit, watched_process
from mmcompress.cli.program_name import make_resume_line, name_program
from mmcompress.cli.watched_process import is_watched
from mmcompress.workspace.command_line import SENT_AS_VARIABLE, read_command_line

CHILD = """
import os, signal, sys, time
from mmcompress.cli.watched_process import tell_watcher
with tell_watcher():
    {body}
"""
PARENT = """
import subprocess, sys
from mmcompress.cli import submit, watched_process
from mmcompress.cli.program_name import name_program
start = subprocess.Popen
class Child(start):
    def __init__(self, command, **options):
        super().__init__([sys.executable, "-c", {child!r}], **options)
watched_process.subprocess.Popen = Child
sys.exit(watched_process.run_watched(["run", "a b.yaml"]))
"""


def start_watched(body):
    """Start a process that watches a child whose code is `body`."""
    code = PARENT.format(child=CHILD.format(body=body))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "ray.yaml"], True),
        (["run", "plain.yaml"], True),
        (["run", "inline.yaml"], False),
        (["run", "ray.yaml", "--workers", "0"], False),
        (["run", "ray.yaml", "--workers=0"], False),
        (["run", "ray.yaml", "--workers", "4"], True),
        (["run", "ray.yaml", "--set", "search.executor=process"], False),
        (["run", "inline.yaml", "--set", "search.executor=ray"], True),
        (["run", "missing.yaml"], False),
        (["run", "broken.yaml"], False),
        (["run", "--help"], False),
        (["validate", "ray.yaml"], False),
        ([], False),
    ],
)
def test_what_uses_ray_is_watched(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ray.yaml").write_text("search: {executor: ray}\n")
    (tmp_path / "plain.yaml").write_text("name: p\n")
    (tmp_path / "inline.yaml").write_text("search: {executor: inline}\n")
    (tmp_path / "broken.yaml").write_text("search: [\n")
    assert is_watched(arguments) is expected
    monkeypatch.setenv(watched_process.PIPES_VARIABLE, "3,4")
    assert not is_watched(arguments)


def test_a_child_that_ends_by_itself_gives_its_exit_code():
    process = start_watched("sys.exit(3)")
    assert process.communicate()[1] == "" and process.returncode == 3


def test_a_child_that_dies_is_told_with_the_line_that_goes_on():
    process = start_watched("os.kill(os.getpid(), signal.SIGABRT)")
    told = process.communicate()[1]
    assert process.returncode == 1
    assert told.endswith(
        "the process of the run died (signal 6, Aborted); nothing that was finished is lost;"
        " go on with: mmcompress run 'a b.yaml' --resume\n"
    )
    process = start_watched("os._exit(1)")
    assert "exit code 1, without a word" in process.communicate()[1]


def test_what_a_child_that_dies_has_started_ends_with_it():
    start = "helper = subprocess.Popen(['sleep', '60']); print(helper.pid, flush=True)"
    body = f"import subprocess; {start}; os.kill(os.getpid(), signal.SIGKILL)"
    with start_watched(body) as process:
        helper = int(process.stdout.readline())
        process.wait(timeout=20)
    assert is_gone_within(10, helper)


def test_the_command_in_a_report_holds_no_password(monkeypatch):
    words = ["run", "a.yaml", "--track", "mlflow:http://me:secret@host:5000"]
    monkeypatch.setattr(sys, "argv", ["mmcompress", *words])
    monkeypatch.delenv(SENT_AS_VARIABLE, raising=False)
    assert read_command_line() == "mmcompress run a.yaml --track mlflow:http://***@host:5000"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_child_once(number):
    wait = "print('up', flush=True); time.sleep(30)"
    body = f"signal.signal({int(number)}, lambda *_: sys.exit(7)); {wait}"
    with start_watched(body) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.wait(timeout=20) == 7


def test_a_second_interruption_ends_the_child_at_once():
    wait = "print(os.getpid(), flush=True); time.sleep(60)"
    body = f"signal.signal(signal.SIGINT, lambda *_: print('busy', flush=True)); {wait}; time.sleep(60)"
    with start_watched(body) as process:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read().endswith(
            "interrupted at once; go on with: mmcompress run 'a b.yaml' --resume\n"
        )
    assert is_gone_within(20, child)


def test_a_process_that_cleans_up_for_long_ends_at_the_second_interruption():
    code = """
import time
from mmcompress.cli.lazy_group import stop_on_interruptions
with stop_on_interruptions("the last words"):
    try:
        print("up", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == "\nstopping; Ctrl-C again ends it at once\nthe last words\n"


def is_gone_within(seconds, process_id):
    """Return whether a process ends in time; one that does not is ended."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.kill(process_id, signal.SIGKILL)
    return False


@pytest.mark.slow
def test_a_child_whose_parent_is_killed_ends_as_after_sigterm():
    with start_watched("print(os.getpid(), flush=True); time.sleep(60)") as process:
        child = int(process.stdout.readline())
        process.kill()
    assert is_gone_within(20, child)


def start_run(tiny, out, workers):
    """Start a run of the tiny pipeline, and wait until it searches."""
    words = ["run", tiny / "spec.yaml", "--out", out, "--workers", workers]
    words += ["--set", "search.trials=2000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmcompress.cli", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = out / "progress.jsonl"
    while not (log.exists() and '"search"' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_stops_a_run_within_seconds_and_says_how_to_go_on(tiny, tmp_path, workers):
    with start_run(tiny, tmp_path / "r", workers) as process:
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        seconds = time.monotonic() - start
    assert process.returncode == 130, told[-2000:]
    assert "stopping; Ctrl-C again ends it at once" in told
    assert f"--workers {workers} --set search.trials=2000 --resume" in told
    assert "Traceback" not in told
    assert seconds < 20


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_no_process_of_a_run(tiny, tmp_path):
    with start_run(tiny, tmp_path / "r", 1) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        while "stopping; Ctrl-C again" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert "interrupted at once; go on with: " in process.stderr.read()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def answer_of_click(monkeypatch, answer):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: answer is not None))
    monkeypatch.setattr(submit.click, "confirm", lambda question: answer)


@pytest.mark.parametrize("answer", [None, False, True])
def test_ctrl_c_at_a_followed_job_stops_it_where_that_is_asked_for(monkeypatch, capsys, answer):
    stopped = []
    server = SimpleNamespace(stop_job=stopped.append)
    monkeypatch.setattr(submit, "resolve_entry", lambda name: lambda address: server)
    answer_of_click(monkeypatch, answer)
    submit._leave_or_stop("job_1", "http://me:secret@head:8265")
    told = " ".join(capsys.readouterr().err.split())
    if answer:
        assert stopped == ["job_1"] and "the same command goes on with its run" in told
        return
    # Without a terminal nobody is asked: it goes on.
    assert stopped == [] and "job job_1 goes on" in told
    assert "mmcompress job stop job_1 --address http://***@head:8265" in told


def test_a_job_goes_on_by_the_line_that_sent_it(monkeypatch):
    sent_as = "mmcompress submit my.yaml --address http://head:8265 --out /shared/run"
    monkeypatch.setenv(SENT_AS_VARIABLE, sent_as)
    assert make_resume_line(["run", "spec.yaml", "--out", "/shared/run"]) == sent_as
    assert read_command_line() == sent_as


def test_the_line_that_goes_on_can_be_copied_into_a_shell(monkeypatch):
    arguments = ["run", "my spec.yaml", "--target", "12ms p95"]
    line = make_resume_line(arguments, flags=["--debug"])
    assert shlex.split(line)[1:] == ["--debug", *arguments, "--resume"]
    monkeypatch.setattr(sys, "argv", ["mmcompress", *arguments])
    assert shlex.split(read_command_line()) == ["mmcompress", *arguments]


def test_a_line_to_copy_names_the_program_as_it_is_found(monkeypatch, tmp_path):
    assert name_program() == "mmcompress"
    monkeypatch.setenv("PATH", str(tmp_path))
    program = Path(name_program())
    assert program.resolve() == (Path(sys.executable).parent / "mmcompress").resolve()
