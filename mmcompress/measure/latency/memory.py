"""Measures the memory of processes.

This file imports the runtime alone: run as a module, it is the process whose memory is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

from mmcompress.measure.latency.fresh_python import run_in_fresh_python
from mmcompress.runtime.environment import BYTES_PER_MB
from mmcompress.runtime.graph import load_bundle

MAX_MEMORY_PROBE_SECONDS = 600
"""Seconds after which the measurement of a bundle's memory is given up."""


def read_peak_memory_mb() -> float:
    """Return the peak resident memory of this process so far, in MB; 0 if the system has no figure.

    Only Linux has one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / BYTES_PER_MB
    return 0.0


def release_memory() -> None:
    """Return freed memory to the system: the C library keeps that of large models for itself."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has this function
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure_memory_mb(bundle: Path | None = None) -> float:
    """Return the peak resident memory of a fresh process, in MB.

    Args:
        bundle: The bundle that the process loads and asks once; None only imports the runtime.

    Raises:
        subprocess.CalledProcessError: The process failed.
        subprocess.TimeoutExpired: It took longer than `MAX_MEMORY_PROBE_SECONDS`.
    """
    release_memory()  # this process and the new one both hold a large pipeline
    process = run_in_fresh_python(
        "mmcompress.measure.latency.memory",
        str(bundle) if bundle else "",
        timeout=MAX_MEMORY_PROBE_SECONDS,
    )
    process.check_returncode()
    return int(process.stdout.split()[-1]) / BYTES_PER_MB


def _probe_memory(bundle: str) -> int:
    """Load a bundle, if one is named, and ask it once; returns the peak memory so far, in bytes."""
    if bundle:
        pipeline = load_bundle(bundle)
        request = pipeline.make_noise_request()
        pipeline.answer_batch([request] * pipeline.manifest.get("batch", 1))
    peak_mb = read_peak_memory_mb()
    if peak_mb:
        return round(peak_mb * BYTES_PER_MB)
    import resource  # only Unix has it

    # Second choice: on Linux this figure also counts the parent process before the start.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(_probe_memory(sys.argv[1] if len(sys.argv) > 1 else ""))
