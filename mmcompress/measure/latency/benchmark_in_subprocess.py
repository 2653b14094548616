"""Bundles measured in processes of their own, as they are deployed.

In a process that holds torch and its models, or has trained, a large pipeline answers 1 to 3 % slower than in a fresh
one and a small one does not: of one pair, measured in turn in both, the speed-up came out 1.3 to 2.5 % too good.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress import errors
from mmcompress.errors import DataError, MmcompressError
from mmcompress.measure.latency.bench import (
    BUNDLE_LOADS,
    MIN_REQUESTS,
    GenerationTraces,
    Samples,
    bench_pipelines,
)
from mmcompress.runtime.graph import load_bundle
from mmcompress.storage import read_record, write_record
from mmcompress.version import CHECKOUT_FOLDER

Requests = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class BenchmarkJob:
    """One sitting: what `latency.observe` is given. Of `requests` arrays lie in a file beside it."""

    bundles: dict[str, str]
    threads: int | None
    requests: tuple[dict[str, Any], ...]
    warmup: int
    requests_per_bundle: int
    traces: tuple[GenerationTraces, ...]
    seconds: float
    min_requests: int
    first_request: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkOutcome:
    """What was observed of every bundle, or the error (its class, its arguments) that ended it.

    `seconds`: how long it took to load and to ask them.
    """

    samples: dict[str, Samples]
    error: tuple[str, ...] = ()
    seconds: float = 0.0


def bench_repeated(
    bundles: Mapping[str, Path],
    threads: int | None,
    requests: Requests,
    warmup: int,
    rounds: int,
    said: Sequence[GenerationTraces] = (),
    seconds: float = float("inf"),
    least: int = MIN_REQUESTS,
    first: int = 0,
    sittings: int = BUNDLE_LOADS,
    *,
    benchmark: Callable[[BenchmarkJob, Path], dict[str, Samples]] | None = None,
) -> dict[str, Samples]:
    """What `observe` sees of bundles in sittings that share time and requests, each in a process of its own.

    Raises what loading or asking them raises. `benchmark` does one sitting; by default `apart`.
    """
    benchmark = benchmark or benchmark_in_subprocess
    total, part = {n: Samples() for n in bundles}, lambda count: -(-count // sittings)
    where = {n: str(Path(at).resolve()) for n, at in bundles.items()}
    with tempfile.TemporaryDirectory() as scratch:
        left = save_requests(Path(scratch), requests)
        for _ in range(sittings):
            sent = (first + len(next(iter(total.values())).ms)) % len(requests)
            much = (part(warmup), part(rounds), tuple(said), seconds / sittings, part(least), sent)
            found = benchmark(BenchmarkJob(where, threads, left, *much), Path(scratch))
            total = {n: s + found[n] for n, s in total.items()}
    return total


def benchmark_in_subprocess(job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
    """Do a job whose requests lie in a folder, in a fresh process."""
    write_record(folder / "job.json", job, indent=None)
    path = os.pathsep.join(p for p in (str(CHECKOUT_FOLDER), os.environ.get("PYTHONPATH", "")) if p)
    command = [
        sys.executable,
        "-m",
        "mmcompress.measure.latency.benchmark_in_subprocess",
        str(folder),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [
            f"it ended with {done.returncode}; out of memory?"
        ]
        raise MmcompressError(f"measuring failed in its own process: {why[0]}")
    found = read_record(BenchmarkOutcome, folder / "seen.json")
    if found.error:
        raise getattr(errors, found.error[0])(*found.error[1:])
    return found.samples


def bench_in_process(job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
    """Do a job in this process."""
    pipelines = {n: load_bundle(at, job.threads) for n, at in job.bundles.items()}
    requests = load_requests(folder, job.requests)
    return bench_pipelines(
        pipelines,
        requests,
        job.warmup,
        job.requests_per_bundle,
        job.traces,
        job.seconds,
        job.min_requests,
        job.first_request,
    )


def save_requests(folder: Path, requests: Requests) -> tuple[dict[str, Any], ...]:
    """Write the arrays of requests to `requests.npz`, as `number/port`; the rest is given back, files as text."""
    arrays = {
        f"{i}/{k}": v
        for i, r in enumerate(requests)
        for k, v in r.items()
        if isinstance(v, np.ndarray)
    }
    np.savez(folder / "requests.npz", **arrays)  # type: ignore[arg-type]
    text = lambda v: str(v) if isinstance(v, Path) else v
    return tuple(
        {k: text(v) for k, v in r.items() if not isinstance(v, np.ndarray)} for r in requests
    )


def load_requests(folder: Path, rest: Requests = ()) -> list[dict[str, Any]]:
    """Requests as they were saved. Raises `DataError`."""
    rows: dict[int, dict[str, Any]] = {i: dict(r) for i, r in enumerate(rest)}
    try:
        with np.load(folder / "requests.npz", allow_pickle=False) as given:
            for key in given.files:
                i, _, port = key.partition("/")
                rows.setdefault(int(i), {})[port] = given[key]
    except (OSError, ValueError) as e:
        raise DataError(f"{folder}: the requests can't be read: {e}") from e
    return [rows[i] for i in sorted(rows)]


if __name__ == "__main__":
    folder, began = Path(sys.argv[1]), time.perf_counter()
    try:
        samples = bench_in_process(read_record(BenchmarkJob, folder / "job.json"), folder)
        outcome = BenchmarkOutcome(samples=samples, seconds=time.perf_counter() - began)
    except MmcompressError as e:
        outcome = BenchmarkOutcome(samples={}, error=(type(e).__name__, *map(str, e.args)))
    write_record(folder / "seen.json", outcome, indent=None)
