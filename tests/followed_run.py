"""A command that runs in a process of its own, and is looked at from outside while it works."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from mmcompress.results.records import Summary
from mmcompress.search import study
from mmcompress.storage import read_record

LOOK_SECONDS = 0.1
"""Seconds between two looks at a run."""


def start_command(*words, **options):
    """Start a command of mmcompress; what it prints can be read when it has ended."""
    return subprocess.Popen(
        [sys.executable, "-m", "mmcompress.cli", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for_trials(folder, count, *, process, seconds=240):
    """Wait until so many trials of a run are finished; returns them."""
    journal = folder / "study.journal"
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        assert process.poll() is None, process.communicate()
        if journal.exists():
            finished = study.read_finished_trials(study.open_study(journal))
            if len(finished) >= count:
                return finished
        time.sleep(LOOK_SECONDS)
    raise AssertionError(f"no {count} trials within {seconds} s")


def find_processes_of(folder, *, but):
    """Return the processes that name a folder in their command line, but for one."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(folder) in words and process.pid != but.pid:
            found.append(process)
    return found


def check_end(process, *, out, before, seconds=600):
    """Let a run end, and check that none of the trials before is lost or was done twice."""
    _, told = process.communicate(timeout=seconds)
    assert process.returncode in (0, 3), told[-2000:]
    summary = read_record(Summary, out / "summary.json")
    keys = {trial.candidate.make_key() for trial in summary.trials}
    assert {trial.candidate.make_key() for trial in before} <= keys
    assert len(keys) == len(summary.trials)
    doctor = start_command("doctor", out)
    answer, trouble = doctor.communicate(timeout=120)
    assert doctor.returncode == 0, answer + trouble
    return summary
