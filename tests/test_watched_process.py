"""A command that uses Ray is watched: when its process dies, a line says how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmcompress.cli import watched_process
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
from mmcompress.cli import watched_process
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
    print("up", flush=True)
    try:
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
