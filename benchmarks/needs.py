"""Compare the memory and the disk that a run says it will take with what it takes.

    python benchmarks/needs.py pipelines/clip_captioner.yaml --out runs/needs --target 2x

Runs `mmcompress run` with the options behind `--`, and samples the memory of all its processes and
the disk of its folder. It prints both beside the forecast. It fails where a forecast is off by more than
a factor of 1.5.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from process_memory import MemorySampler

from mmcompress.run.begin_run import begin_run
from mmcompress.run.preflight import Needs, estimate_needs

MAX_FACTOR = 1.5
"""Largest factor between forecast and truth, in either direction."""
MB = 1e6
"""Bytes."""
GOOD_EXIT_CODES = (0, 3)
"""Done, or the target is missed and the best result is written."""
DISK_SAMPLE_SECONDS = 1.0
"""Seconds between two samples of the disk."""


class DiskSampler:
    """Sample the size of a folder in a thread, without the outputs that are kept on top."""

    def __init__(self, folder: Path, left_out: str):
        self.folder = folder
        self.left_out = left_out
        self.peak_mb = 0.0
        self.is_done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def _sample(self) -> None:
        """Sample until the run is done."""
        while not self.is_done.wait(DISK_SAMPLE_SECONDS):
            self.peak_mb = max(self.peak_mb, self._measure())

    def _measure(self) -> float:
        """Return the megabytes of all files; links to one file count once."""
        bytes_by_file: dict[int, int] = {}
        for path in self.folder.rglob("*"):
            try:
                status = path.lstat()
            except OSError:
                continue  # a file that was there a moment ago
            if self.left_out not in path.parts and not path.is_dir():
                bytes_by_file[status.st_ino] = status.st_blocks * 512
        return sum(bytes_by_file.values()) / MB

    def stop(self) -> None:
        """End the thread."""
        self.is_done.set()
        self.thread.join()


def forecast(spec: str, settings: dict[str, str]) -> Needs:
    """Return what a run says of itself before it begins."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        begin_run(spec, Path(scratch) / "run", overrides=settings) as run,
    ):
        return estimate_needs(run)


def describe(name: str, *, expected_mb: float, actual_mb: float) -> tuple[str, bool]:
    """Return a line for a person, and whether the forecast is good enough."""
    factor = expected_mb / max(actual_mb, 1e-9)
    is_good = 1 / MAX_FACTOR <= factor <= MAX_FACTOR
    verdict = "good" if is_good else "BAD"
    line = f"{name}: said {expected_mb:.0f} MB, took {actual_mb:.0f} MB: {factor:.2f}x, {verdict}"
    return line, is_good


def parse_settings(arguments: list[str]) -> dict[str, str]:
    """Return the values behind `--set`, by dotted key."""
    pairs = [value.partition("=") for value in arguments]
    return {key: value for key, _, value in pairs}


def main() -> None:
    """Forecast, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("spec")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="2x")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    settings = {"target": arguments.target, **parse_settings(arguments.settings)}
    needs = forecast(arguments.spec, settings)
    command = [sys.executable, "-m", "mmcompress.cli", "run", arguments.spec]
    command += ["--out", str(arguments.out)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    process = subprocess.Popen(command)
    memory = MemorySampler(process.pid)
    disk = DiskSampler(arguments.out, left_out="teacher_outputs")
    exit_code = process.wait()
    memory.stop()
    disk.stop()
    lines = [
        describe("memory", expected_mb=needs.memory_mb, actual_mb=memory.peak_bytes / MB),
        describe("disk", expected_mb=needs.disk_mb, actual_mb=disk.peak_mb),
    ]
    for line, _ in lines:
        print(line)
    print(f"exit code {exit_code}; most memory after {memory.peak_seconds:.0f} s")
    if exit_code not in GOOD_EXIT_CODES or not all(is_good for _, is_good in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
