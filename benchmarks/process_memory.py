"""The memory of a process and all its descendants (Linux)."""

from __future__ import annotations

import threading
import time
from pathlib import Path

SAMPLE_SECONDS = 0.5
"""Seconds between two samples of the memory."""


def list_children() -> dict[int, list[int]]:
    """List the child processes of every process (Linux)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        # The name of a process stands in brackets and may hold spaces.
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(path.parent.name))
    return children


def read_proportional_memory(process_id: int) -> int:
    """Read the proportional set size of a process in bytes; 0 if it has ended (Linux)."""
    try:
        rollup = Path(f"/proc/{process_id}/smaps_rollup").read_text()
    except OSError:
        return 0
    for line in rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def measure_memory(root_process: int) -> int:
    """Measure the memory of a process and all its descendants in bytes; shared pages count once."""
    children = list_children()
    total = 0
    pending = [root_process]
    while pending:
        process_id = pending.pop()
        pending += children.get(process_id, [])
        total += read_proportional_memory(process_id)
    return total


class MemorySampler:
    """Sample the memory of a process and its descendants in a thread."""

    def __init__(self, process_id: int):
        self.process_id = process_id
        self.start = time.time()
        self.peak_bytes = 0
        self.peak_seconds = 0.0
        """Seconds from the start to the peak."""
        self.is_done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def _sample(self) -> None:
        """Sample until the process is done."""
        while not self.is_done.wait(SAMPLE_SECONDS):
            current_bytes = measure_memory(self.process_id)
            if current_bytes > self.peak_bytes:
                self.peak_bytes = current_bytes
                self.peak_seconds = time.time() - self.start

    def stop(self) -> None:
        """End the thread."""
        self.is_done.set()
        self.thread.join()
