"""The clock that a run reads and waits by, and the timing of single calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from mmcompress.stats import Latency, summarize_latency

MIN_TIMED_CALLS = 3
"""Calls that are timed even when the time is up: fewer have no median."""

MIN_TRIES = 2
"""Short measurements that are made even when the time is up: the lower of them is taken."""


class Clock(Protocol):
    """A source of elapsed time. It stands in one place so that a test can replace it."""

    def read_seconds(self) -> float:
        """Return seconds since some fixed moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
        ...


class SystemClock:
    """The clock of this machine; it never goes backwards."""

    def read_seconds(self) -> float:
        """Return seconds since some fixed moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
        time.sleep(seconds)


def time_call(
    call: Callable[[], object], warmup: int, *, rounds: int, limit: float = 1e9
) -> Latency:
    """Time a call many times.

    Args:
        call: What is timed.
        warmup: Calls before the first one that counts.
        rounds: Calls that count.
        limit: Seconds after which no further call starts; `MIN_TIMED_CALLS` are made anyway. The
            warm-up has as many seconds of its own.

    Returns:
        Milliseconds of a call.
    """
    warmup_start = time.perf_counter()
    for _ in range(warmup):
        call()
        if time.perf_counter() - warmup_start > limit:
            break
    call_ms: list[float] = []
    timing_start = time.perf_counter()
    while len(call_ms) < rounds:
        has_enough_calls = len(call_ms) >= MIN_TIMED_CALLS
        if has_enough_calls and time.perf_counter() - timing_start >= limit:
            break
        start = time.perf_counter()
        call()
        call_ms.append((time.perf_counter() - start) * 1e3)
    return summarize_latency(call_ms)


def time_calls_in_turn(
    calls: Sequence[Callable[[], object]], warmup: int, *, rounds: int, limit: float
) -> list[float]:
    """Time several calls in turn, so that a change of the machine's pace meets all of them.

    Args:
        calls: What is timed.
        warmup: Rounds before the first one that counts.
        rounds: Rounds that count.
        limit: Seconds after which no further round starts; `MIN_TIMED_CALLS` rounds are made
            anyway. The warm-up has as many seconds of its own.

    Returns:
        The p50 of each call in milliseconds.
    """
    warmup_start = time.perf_counter()
    for _ in range(warmup):
        for call in calls:
            call()
        if time.perf_counter() - warmup_start > limit:
            break
    ms_by_call: list[list[float]] = [[] for _ in calls]
    timing_start = time.perf_counter()
    for finished_rounds in range(rounds):
        has_enough_rounds = finished_rounds >= MIN_TIMED_CALLS
        if has_enough_rounds and time.perf_counter() - timing_start >= limit:
            break
        for call, call_ms in zip(calls, ms_by_call, strict=True):
            start = time.perf_counter()
            call()
            call_ms.append((time.perf_counter() - start) * 1e3)
    return [median(call_ms) for call_ms in ms_by_call]


def find_lowest_median(
    call: Callable[[], object], warmup: int, *, rounds: int, limit: float, tries: int = 3
) -> float:
    """Measure a call a few times, and take the lowest median: what else runs on a machine only adds
    time.

    Args:
        call: What is timed.
        warmup: Calls before every measurement.
        rounds: Calls of every measurement.
        limit: Seconds of all measurements together. When a slow call takes longer, `MIN_TRIES` will
            do.
        tries: Measurements.

    Returns:
        The lowest p50 in milliseconds.
    """
    start = time.perf_counter()
    lowest_p50 = float("inf")
    for i in range(tries):
        if i >= MIN_TRIES and time.perf_counter() - start > limit:
            break
        latency = time_call(call, warmup, rounds=rounds, limit=limit / tries)
        lowest_p50 = min(lowest_p50, latency.p50)
    return lowest_p50
