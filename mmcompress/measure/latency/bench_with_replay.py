"""Compares bundles for the same work: all of them write what the dense bundle wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmcompress.measure.latency.bench import (
    BenchmarkOptions,
    Request,
    Samples,
    bench_repeats,
    choose_comparison_seconds,
    count_batches,
)
from mmcompress.measure.latency.benchmark_in_subprocess import (
    BenchmarkJob,
    bench_repeated,
    plan_load,
)

MIN_REPLAYED_REQUESTS = 8
"""Requests that a comparison chooses at least, however slow the dense pipeline is: one picture or
recording alone would decide too much."""


MAX_LOADS = 8
"""Loads of quick pipelines at most in one comparison that is not certain enough before."""


def bench_with_replay(
    bundles: Mapping[str, Path],
    requests: Sequence[Request],
    *,
    options: BenchmarkOptions,
    dense_ms: float,
    benchmark: Callable[[BenchmarkJob, Path], dict[str, Samples]] | None = None,
    is_certain: Callable[[Mapping[str, Samples]], bool] | None = None,
) -> dict[str, Samples]:
    """Measure bundles in turn, all writing what the dense bundle wrote for the first requests.

    Args:
        bundles: Folders of the bundles by name.
        requests: What to send; `select_requests` chooses the first of them.
        options: Its `traces` are those of the dense bundle. `seconds` and `loads` are replaced:
            they follow from `dense_ms`.
        dense_ms: Milliseconds per request of the dense pipeline.
        benchmark: Does one job; default: `benchmark_in_subprocess`.
        is_certain: Whether what was observed is enough. Else quick pipelines are loaded again, up
            to `MAX_LOADS` times. It must not favour what meets the target. By default, it is
            enough.

    Returns:
        What was observed of each bundle, by name.
    """
    loads = bench_repeats(dense_ms)
    options = replace(options, seconds=choose_comparison_seconds(dense_ms), loads=loads)
    selected_requests = select_requests(
        requests, len(options.traces), dense_ms=dense_ms, batch=options.batch
    )
    samples = bench_repeated(bundles, selected_requests, options=options, benchmark=benchmark)
    if is_certain is None or loads == 1:
        return samples
    while loads < MAX_LOADS and not is_certain(samples):
        sent = len(next(iter(samples.values())).ms)
        one_load = plan_load(options, sent % count_batches(selected_requests, options.batch))
        new_samples = bench_repeated(
            bundles, selected_requests, options=one_load, benchmark=benchmark
        )
        samples = {name: samples[name] + new_samples[name] for name in samples}
        loads += 1
    return samples


def select_requests(
    requests: Sequence[Request], trace_count: int, *, dense_ms: float, batch: int = 1
) -> list[Request]:
    """Return the first requests, as many as a comparison has time for and has traces of.

    Args:
        requests: All requests of a run.
        trace_count: Requests, or batches, whose answers by the dense pipeline are known.
        dense_ms: Milliseconds per request, or batch, of the dense pipeline.
        batch: Requests that are answered together.
    """
    requests_in_time = int(choose_comparison_seconds(dense_ms) * 1e3 / dense_ms)
    count = min(trace_count, max(MIN_REPLAYED_REQUESTS, requests_in_time))
    return list(requests[: count * batch])
