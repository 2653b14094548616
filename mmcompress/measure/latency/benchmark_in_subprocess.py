"""Measures bundles in fresh processes, as they are deployed.

A process that holds torch and its models, or has trained, makes a large pipeline 1 to 3 % slower
than a fresh one. It does not make a small pipeline slower. One pair was measured in turn in both
kinds of process: the speed-up came out 1.3 to 2.5 % too good where torch was.

A job crosses to its process as files: `job.json` and `requests.npz` go there, `outcome.json` comes
back. `python -m mmcompress.measure.latency.benchmark_in_subprocess FOLDER` does the job of a
folder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmcompress import errors
from mmcompress.errors import DataError, MmcompressError
from mmcompress.measure.latency.bench import (
    BenchmarkOptions,
    Request,
    Samples,
    bench_pipelines,
    count_batches,
)
from mmcompress.measure.latency.fresh_python import run_in_fresh_python
from mmcompress.runtime.graph import load_bundle
from mmcompress.storage import read_record, write_record

JOB_FILE = "job.json"
"""The `BenchmarkJob` of a folder."""

REQUESTS_FILE = "requests.npz"
"""The arrays of all requests, each under `number/input`."""

OUTCOME_FILE = "outcome.json"
"""The `BenchmarkOutcome` of a folder, once its job is done."""


SavedRequest = dict[str, object]
"""The inputs of one request by name, as they are read back from files."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkJob:
    """One load of some bundles and the requests that are sent to them: `job.json`."""

    bundles: dict[str, str]
    """Absolute folders of the bundles, by name."""
    requests: tuple[SavedRequest, ...]
    """The requests without their arrays, which lie in `requests.npz` beside the job."""
    options: BenchmarkOptions
    """How to measure. `loads` is 1: the job is one of them."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkOutcome:
    """What a job's process hands back: `outcome.json`."""

    samples: dict[str, Samples]
    """What was observed of each bundle, by name; empty after an error."""
    error: tuple[str, ...] = ()
    """The error that ended the job: the name of its class, then its arguments. Empty: none."""
    seconds: float = 0.0
    """Seconds that loading the bundles and sending the requests took, without starting Python."""


def bench_repeated(
    bundles: Mapping[str, Path],
    requests: Sequence[Request],
    *,
    options: BenchmarkOptions,
    benchmark: Callable[[BenchmarkJob, Path], dict[str, Samples]] | None = None,
) -> dict[str, Samples]:
    """Measure bundles in turn, loaded anew `options.loads` times, each time in a fresh process.

    The loads share seconds, warm-up and requests, and each goes on where the last one ended.

    Args:
        bundles: Folders of the bundles by name.
        requests: What to send; they are sent again from the first when all were sent.
        options: How to measure; see `BenchmarkOptions`.
        benchmark: Does one job whose requests lie in a folder; default: `benchmark_in_subprocess`.

    Returns:
        What all loads observed of each bundle, by name.

    Raises:
        MmcompressError: What loading or running a bundle raised, or that its process died.
    """
    benchmark = benchmark or benchmark_in_subprocess
    batch_count = count_batches(requests, options.batch)
    samples: dict[str, Samples] = {}
    folders: dict[str, str] = {}
    for name, folder in bundles.items():
        samples[name] = Samples()
        # The process may have another working directory.
        folders[name] = str(folder.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        saved_requests = save_requests(Path(scratch), requests)
        for _ in range(options.loads):
            any_samples = next(iter(samples.values()))
            next_request = (options.first_request + len(any_samples.ms)) % batch_count
            job = BenchmarkJob(
                bundles=folders,
                requests=saved_requests,
                options=plan_load(options, next_request),
            )
            for name, new_samples in benchmark(job, Path(scratch)).items():
                samples[name] = samples[name] + new_samples
    return samples


def plan_load(options: BenchmarkOptions, first_request: int) -> BenchmarkOptions:
    """Return the options of one of the loads: its part of the work, beginning with a request."""
    loads = options.loads
    return replace(
        options,
        warmup=_divide_up(options.warmup, loads),
        max_requests=_divide_up(options.max_requests, loads),
        min_requests=_divide_up(options.min_requests, loads),
        seconds=options.seconds / loads,
        first_request=first_request,
        loads=1,
    )


def _divide_up(count: int, parts: int) -> int:
    """Return `count / parts`, rounded up."""
    return -(-count // parts)


def benchmark_in_subprocess(job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
    """Do a job in a fresh process.

    Args:
        job: What to measure.
        folder: Where its `requests.npz` lies; `job.json` and `outcome.json` are written there.

    Returns:
        What was observed of each bundle, by name.

    Raises:
        MmcompressError: What the job raised, or that its process ended without an outcome.
    """
    write_record(folder / JOB_FILE, job, indent=None)
    process = run_in_fresh_python("mmcompress.measure.latency.benchmark_in_subprocess", str(folder))
    if process.returncode:
        error_lines = process.stderr.strip().splitlines()
        reason = f"it ended with {process.returncode}; out of memory?"
        if error_lines:
            reason = error_lines[-1]
        raise MmcompressError(f"measuring failed in its own process: {reason}")
    outcome = read_record(BenchmarkOutcome, folder / OUTCOME_FILE)
    if outcome.error:
        error_name, *arguments = outcome.error
        error_class: type[MmcompressError] = getattr(errors, error_name)
        raise error_class(*arguments)
    return outcome.samples


def bench_in_process(job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
    """Do a job whose `requests.npz` lies in `folder` in this process; returns what it observed."""
    pipelines = {}
    for name, bundle in job.bundles.items():
        pipelines[name] = load_bundle(bundle, job.options.threads, provider=job.options.provider)
    requests = load_requests(folder, job.requests)
    return bench_pipelines(pipelines, requests, options=job.options)


def save_requests(folder: Path, requests: Sequence[Request]) -> tuple[SavedRequest, ...]:
    """Write the arrays of requests to `requests.npz`, each under `number/input`.

    Args:
        folder: Where the file is written.
        requests: Inputs by name.

    Returns:
        What is not an array, one entry per request. Paths are given as text.
    """
    arrays: dict[str, np.ndarray] = {}
    saved_requests: list[SavedRequest] = []
    for i, request in enumerate(requests):
        plain_request: SavedRequest = {}
        for input_name, value in request.items():
            if isinstance(value, np.ndarray):
                arrays[f"{i}/{input_name}"] = value
            elif isinstance(value, Path):
                plain_request[input_name] = str(value)
            else:
                plain_request[input_name] = value
        saved_requests.append(plain_request)
    np.savez(folder / REQUESTS_FILE, **arrays)  # type: ignore[arg-type]
    return tuple(saved_requests)


def load_requests(folder: Path, saved_requests: Sequence[Request] = ()) -> list[SavedRequest]:
    """Read requests that `save_requests` wrote.

    Args:
        folder: Where `requests.npz` lies.
        saved_requests: What `save_requests` returned: everything that is not an array.

    Raises:
        DataError: The file is missing or damaged.
    """
    requests: dict[int, SavedRequest] = {}
    for i, plain_request in enumerate(saved_requests):
        requests[i] = dict(plain_request)
    try:
        with np.load(folder / REQUESTS_FILE, allow_pickle=False) as arrays:
            for key in arrays.files:
                number, _, input_name = key.partition("/")
                requests.setdefault(int(number), {})[input_name] = arrays[key]
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the requests can't be read: {error}") from error
    return [requests[i] for i in sorted(requests)]


def _do_job(folder: Path) -> None:
    """Do the job of a folder in this process and write its outcome there."""
    start_seconds = time.perf_counter()
    try:
        job = read_record(BenchmarkJob, folder / JOB_FILE)
        samples = bench_in_process(job, folder)
        seconds = time.perf_counter() - start_seconds
        outcome = BenchmarkOutcome(samples=samples, seconds=seconds)
    except MmcompressError as error:
        arguments = [str(argument) for argument in error.args]
        outcome = BenchmarkOutcome(samples={}, error=(type(error).__name__, *arguments))
    write_record(folder / OUTCOME_FILE, outcome, indent=None)


if __name__ == "__main__":
    _do_job(Path(sys.argv[1]))
