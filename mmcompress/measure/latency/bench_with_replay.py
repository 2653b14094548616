"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcompress.measure.latency.bench import (
    GenerationTraces,
    PipelineLatency,
    Samples,
    bench_repeats,
    comparison_seconds,
)
from mmcompress.measure.latency.benchmark_in_subprocess import BenchmarkJob, bench_repeated


def bench_with_replay(
    bundles: Mapping[str, Path],
    requests: Sequence[dict[str, Any]],
    said: Sequence[GenerationTraces],
    dense_ms: float,
    threads: int | None,
    warmup: int,
    rounds: int,
    *,
    benchmark: Callable[[BenchmarkJob, Path], dict[str, Samples]] | None = None,
) -> dict[str, PipelineLatency]:
    """Measure bundles in turn, all writing what the dense one `said` of the first requests."""
    some = select_requests(requests, said, dense_ms=dense_ms)
    how = (warmup, rounds, said, comparison_seconds(dense_ms))
    found = bench_repeated(
        bundles, threads, some, *how, sittings=bench_repeats(dense_ms), benchmark=benchmark
    )
    return {n: s.summarize() for n, s in found.items()}


def select_requests(
    requests: Sequence[dict[str, Any]], said: Sequence[GenerationTraces], *, dense_ms: float
) -> list[dict[str, Any]]:
    """As many of the requests as there is time for, eight at least; of those whose answers are known."""
    return list(
        requests[: min(len(said), max(8, int(comparison_seconds(dense_ms) * 1e3 / dense_ms)))]
    )
