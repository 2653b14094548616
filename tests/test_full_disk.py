"""A disk that is really full under a run: a file system of its own, of some hundred megabytes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from followed_run import check_end, start_command, wait_for_trials

from mmcompress.errors import FULL_DISK_CURE
from mmcompress.search import study

DISK_SIZE = "400m"


@pytest.fixture()
def disk(tmp_path):
    """The folder of a small file system in memory, which ends with the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs"]
    try:
        mounted = subprocess.run(["mount", *options, folder], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount on this system")
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file):
    """Write to a file until the disk is full."""
    block = bytes(2**20)
    with file.open("wb", buffering=0) as ballast:
        while True:
            try:
                ballast.write(block)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
        os.fsync(ballast.fileno())


@pytest.mark.very_slow
@pytest.mark.timeout(600)
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(tiny, disk, tmp_path):
    out = disk / "run"
    words = ["run", tiny / "spec.yaml", "--out", out]
    words += ["--set", "search.executor=inline", "--set", "search.trials=40"]
    process = start_command(*words)
    wait_for_trials(out, 3, process=process)
    fill(disk / "ballast")
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2, told[-2000:]
    assert "No space left on device" in told and str(out) in told and FULL_DISK_CURE in told
    assert "Traceback" not in told
    # The last line may be torn. It is mended in a copy here, and by the run there.
    copy = shutil.copy(out / "study.journal", tmp_path / "journal")
    finished = study.read_finished_trials(study.open_study(Path(copy)))
    assert len(finished) >= 3
    (disk / "ballast").unlink()
    check_end(start_command(*words, "--resume"), out=out, before=finished)
