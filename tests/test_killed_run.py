"""A whole run that is killed again and again ends as one that was left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_run import differences, record_of
from killed_run import run_tiny

from mmcompress.cli import main
from mmcompress.results.records import Summary
from mmcompress.search import study
from mmcompress.storage import read_record

KILLS = 20
TESTS = Path(__file__).parent


def describe(folder):
    """Return what must be the same, in the order of the proposals."""
    summary = read_record(Summary, folder / "summary.json")
    manifest = json.loads((folder / "bundle/manifest.json").read_text())
    return record_of(summary, manifest)


def count_lines(file):
    """Count the lines of a file that need not be there."""
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def kill_until_it_ends(spec, folder, *, dice, max_kills):
    """Kill a run at random moments, and start it again, until it ends; returns the kills."""
    progress = folder / "progress.jsonl"
    for kills in range(max_kills):
        process = subprocess.Popen(
            [sys.executable, "killed_run.py", spec, folder],
            cwd=TESTS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        # A kill may fall on any line of the progress.
        lines_to_wait = count_lines(progress) + dice.randint(1, 6)
        while count_lines(progress) < lines_to_wait and process.poll() is None:
            time.sleep(0.01)
        time.sleep(dice.random() * 0.2)
        is_over = process.poll() is not None
        process.kill()
        _, told = process.communicate()
        if is_over:
            assert process.returncode == 0, told.decode()[-3000:]
            return kills
        found = CliRunner().invoke(main, ["doctor", str(folder)])
        assert found.exit_code in (0, 1), found.output
        if (folder / "study.journal").exists():
            faults = study.list_study_faults(folder / "study.journal")
            assert all(fault.endswith("is damaged") for fault in faults), faults
    run_tiny(spec, folder)
    return max_kills


@pytest.mark.very_slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_left_alone(tiny, tmp_path):
    spec = tiny / "spec.yaml"
    run_tiny(spec, tmp_path / "whole")
    whole = describe(tmp_path / "whole")
    dice = random.Random(11)
    kills = 0
    while kills < KILLS:
        folder = tmp_path / f"killed-{kills}"
        kills += kill_until_it_ends(spec, folder, dice=dice, max_kills=KILLS - kills)
        assert list(differences(whole, describe(folder), tolerance=1e-6)) == []
        found = CliRunner().invoke(main, ["doctor", str(folder)])
        assert found.exit_code == 0, found.output
