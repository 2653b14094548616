"""The clock that a run reads and waits by, in one place so that a test can hand it another one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from mmcompress.stats import Latency, summarize_latency


class Clock(Protocol):
    """A source of elapsed time."""

    def now(self) -> float:
        """Return seconds since some fixed moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
        ...


class SystemClock:
    """The clock of this machine; it never goes backwards."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def time_call(call: Callable[[], Any], warmup: int, *, rounds: int, limit: float = 1e9) -> Latency:
    """Time one call in milliseconds; stops after `limit` seconds with what it has (at least three samples)."""
    began = time.perf_counter()
    for _ in range(warmup):
        call()
        if time.perf_counter() - began > limit:
            break
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < rounds and (len(times) < 3 or time.perf_counter() - began < limit):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return summarize_latency(times)


def min_of_medians(
    call: Callable[[], Any], warmup: int, *, rounds: int, limit: float, tries: int = 3
) -> float:
    """The lowest p50 in milliseconds of a few short measurements: what others do on a machine only ever adds time.

    Two of them will do for a call so slow that they take longer than `limit` seconds.
    """
    began, found = time.perf_counter(), float("inf")
    for i in range(tries):
        if i > 1 and time.perf_counter() - began > limit:
            break
        found = min(found, time_call(call, warmup, rounds=rounds, limit=limit / tries).p50)
    return found
