"""TODO."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

MB = 1e6


MEMORY_PROBE = """\
import pathlib, resource, sys
from mmcompress.runtime import load
if len(sys.argv) > 1:
    pipeline = load(sys.argv[1])
    pipeline(**pipeline.make_noise_request())
status = pathlib.Path("/proc/self/status")  # where there is one: the other figure counts the parent before the start
lines = status.read_text().splitlines() if status.exists() else []
peak = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
print(peak[0] if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next(
        (int(line.split()[1]) * 1024 / MB for line in lines if line.startswith("VmHWM")), 0.0
    )


def release_memory() -> None:
    """Return to the system what was let go: the C library keeps freed memory of large models for itself."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure_memory_mb(bundle: Path | None = None) -> float:
    """Peak resident memory of a process that loads a bundle and answers once; without one, of the bare runtime."""
    release_memory()  # of large models, both processes must fit
    command = [sys.executable, "-c", MEMORY_PROBE, *([str(bundle)] if bundle else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return int(done.stdout.split()[-1]) / MB
