"""Measures latency as a user feels it: whole requests, by wall time, compared pipelines in turns.

The figures are medians with their spread. `bench_pipelines` sends the requests, `Samples` collects
what every request took, and `PipelineLatency` is the summary.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from mmcompress.runtime.graph import Pipeline
from mmcompress.runtime.replay import GenerationTrace, TextWriter
from mmcompress.stats import Latency, summarize_latency

Request = Mapping[str, object]
"""The inputs of one pipeline call by name: an array, a file, or a text each."""

GenerationTraces = dict[str, tuple[GenerationTrace, ...]]
"""What every generator writes for one request, by node and window by window."""

MsByNode = dict[str, list[float]]
"""Milliseconds by node, request by request."""

StepsByNode = dict[str, list[int]]
"""Decode steps by node, request by request."""

Figure = TypeVar("Figure", int, float)

COMPARISON_SECONDS = 30.0
"""Seconds that two quick pipelines are compared for.

A busy machine slows a small model down more than a large one, for seconds at a time. One such
machine gave these spreads (one sigma) of the ratio of medians: 2.8 % over 10 s, 2.6 % over 20 s,
0.5 % over 30 s.
"""

MIN_REQUESTS = 12
"""Requests that a comparison counts at least, even when its seconds are over: a median of fewer
jumps."""

MAX_REQUESTS_FACTOR = 10
"""Upper limit of a comparison's requests, as a multiple of the requests that the spec asks for."""

TURN_SECONDS = 0.1
"""Seconds that one pipeline answers for before the next pipeline takes its turn.

The first request of a turn is sent but not counted: it finds its weights thrown out of the caches.
That costs a small pipeline a fifth of its time, and does not happen to a pipeline that serves
alone. Where one request takes longer than a turn, every turn is one request and every request
counts.
"""

BUNDLE_LOADS = 4
"""Loads of quick pipelines over which one measurement is divided.

Where its weights come to lie in memory makes one load quicker than the next for as long as it
lives. The ratio of one pair of bundles had a spread (one sigma) of 2 % from load to load, and of
0.8 % within one load.
"""


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """How pipelines are measured: how many requests, for how long, and what generators replay."""

    warmup: int
    """Requests sent to every pipeline before the measurement, uncounted; at least one is sent."""
    max_requests: int
    """Requests counted for every pipeline at most."""
    min_requests: int = MIN_REQUESTS
    """Requests counted for every pipeline before `seconds` may end the measurement."""
    seconds: float = math.inf
    """Seconds after which the measurement ends with the requests it has; default: no limit."""
    first_request: int = 0
    """Index of the request to begin with, so that repeated measurements go through all of them."""
    traces: tuple[GenerationTraces, ...] = ()
    """One entry per request, or batch: what generators replay. Empty: they write what they would
    write."""
    threads: int | None = None
    """Threads of every session; None: the number in the bundle's manifest."""
    provider: str | None = None
    """What sessions run on; None: what the bundle's manifest says."""
    batch: int = 1
    """Requests that are answered together. A batch counts as one request wherever requests are
    counted, and its milliseconds are those of the whole batch."""
    loads: int = BUNDLE_LOADS
    """Fresh processes that share the requests and seconds; see `bench_repeated`."""


@dataclass(frozen=True, kw_only=True)
class PipelineLatency:
    """The summary of one measured pipeline: whole requests, nodes and model sessions."""

    latency: Latency
    """Milliseconds of a whole request."""
    nodes: dict[str, Latency]
    """Milliseconds of each node in one request."""
    model_share: float
    """Share of the wall time (0 to 1) spent inside model sessions, median over requests."""
    calls: dict[str, float]
    """Session calls per request by `node/graph`: 1, or the mean number of decode steps."""
    samples: tuple[float, ...] = ()
    """Milliseconds of every request, in the order they were sent."""
    in_session_ms: dict[str, float] = field(default_factory=dict)
    """Median milliseconds per request spent inside the sessions of each node."""
    traces: tuple[GenerationTraces, ...] = ()
    """What the generators wrote for each request, in the order of the requests."""


@dataclass(kw_only=True)
class Samples:
    """What was observed of one pipeline, request by request. `+` joins two measurements."""

    ms: list[float] = field(default_factory=list)
    """Milliseconds of every counted request."""
    session_shares: list[float] = field(default_factory=list)
    """Share of each request (0 to 1) spent inside model sessions."""
    nodes: MsByNode = field(default_factory=dict)
    """Milliseconds of each node, request by request."""
    in_session: MsByNode = field(default_factory=dict)
    """Milliseconds inside the sessions of each node, request by request."""
    decode_steps: StepsByNode = field(default_factory=dict)
    """Decode steps of each node that writes text, request by request."""
    calls: dict[str, int] = field(default_factory=dict)
    """Session calls of all counted requests, by `node/graph`."""
    traces: list[GenerationTraces] = field(default_factory=list)
    """What the generators wrote, for as many of the first requests as were counted."""
    load_requests: list[int] = field(default_factory=list)
    """Counted requests of every load of the bundle, one after the other."""

    def __add__(self, other: Samples) -> Samples:
        calls = dict(self.calls)
        for graph_name, count in other.calls.items():
            calls[graph_name] = calls.get(graph_name, 0) + count
        return Samples(
            ms=self.ms + other.ms,
            session_shares=self.session_shares + other.session_shares,
            nodes=_join_rows(self.nodes, other.nodes),
            in_session=_join_rows(self.in_session, other.in_session),
            decode_steps=_join_rows(self.decode_steps, other.decode_steps),
            calls=calls,
            # Every measurement starts its traces at the first request: the longer one has them all.
            traces=max(self.traces, other.traces, key=len),
            load_requests=self.load_requests + other.load_requests,
        )

    def split_loads(self) -> list[list[float]]:
        """Return the milliseconds of every request, load by load."""
        return split_by_counts(self.ms, self.load_requests)

    def sum_nodes(self) -> list[float]:
        """Return what the nodes took together, request by request, in milliseconds."""
        return [sum(node_ms) for node_ms in zip(*self.nodes.values(), strict=True)]

    def add_request(self, pipeline: Pipeline, seconds: float) -> None:
        """Add the wall time of the request that `pipeline` answered last, and that of its nodes."""
        self.ms.append(seconds * 1e3)
        self.session_shares.append(pipeline.session_seconds / seconds)
        for node_name, node_seconds in pipeline.node_seconds.items():
            session_seconds = pipeline.model_seconds[node_name]
            self.nodes.setdefault(node_name, []).append(node_seconds * 1e3)
            self.in_session.setdefault(node_name, []).append(session_seconds * 1e3)
        for node_name, writer in pipeline.writers.items():
            steps = sum(trace.steps for trace in writer.traces)
            self.decode_steps.setdefault(node_name, []).append(steps)

    def add_calls(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        """Add the session calls of one request, from the counters before and after it."""
        for graph_name, count in after.items():
            new_calls = count - before[graph_name]
            self.calls[graph_name] = self.calls.get(graph_name, 0) + new_calls

    def summarize(self) -> PipelineLatency:
        """Return medians and percentiles of what was observed."""
        node_latencies: dict[str, Latency] = {}
        in_session_ms: dict[str, float] = {}
        for node_name, node_ms in self.nodes.items():
            node_latencies[node_name] = summarize_latency(node_ms)
            median_ms = np.median(self.in_session[node_name])
            in_session_ms[node_name] = float(median_ms)
        request_count = len(self.ms)
        return PipelineLatency(
            latency=summarize_latency(self.ms),
            nodes=node_latencies,
            model_share=float(np.median(self.session_shares)),
            calls={name: count / request_count for name, count in self.calls.items()},
            samples=tuple(self.ms),
            in_session_ms=in_session_ms,
            traces=tuple(self.traces),
        )


def split_by_counts(values: Sequence[float], counts: Sequence[int]) -> list[list[float]]:
    """Return consecutive parts of a sequence.

    Args:
        values: What is split.
        counts: The length of each part; without any, everything is one part.
    """
    parts: list[list[float]] = []
    start = 0
    for count in counts or [len(values)]:
        parts.append(list(values[start : start + count]))
        start += count
    return parts


def summarize_pipelines(samples: Mapping[str, Samples]) -> dict[str, PipelineLatency]:
    """Return the summary of every measured pipeline, by name."""
    return {name: pipeline_samples.summarize() for name, pipeline_samples in samples.items()}


def choose_comparison_seconds(dense_ms: float) -> float:
    """Return the seconds that pipelines are compared for.

    Where every request is a turn of its own, they are compared for twice as long. For 30 seconds
    are 40 requests of half a second. Ratios of their medians had a spread (one sigma) of 1.5 to
    2 %.

    Args:
        dense_ms: Milliseconds per request of the dense pipeline.
    """
    if dense_ms < 1e3 * TURN_SECONDS:
        return COMPARISON_SECONDS
    return 2 * COMPARISON_SECONDS


def has_time_budget(dense_ms: float) -> bool:
    """Return whether a pipeline is quick enough for more measurements than one comparison needs.

    Args:
        dense_ms: Milliseconds per request of the dense pipeline.
    """
    return 3 * MIN_REQUESTS * dense_ms < 1e3 * COMPARISON_SECONDS


def bench_repeats(dense_ms: float) -> int:
    """Return how many loads a comparison with the dense pipeline is divided over.

    Args:
        dense_ms: Milliseconds per request of the dense pipeline.
    """
    return BUNDLE_LOADS if has_time_budget(dense_ms) else 1


def bench_pipelines(
    pipelines: Mapping[str, Pipeline],
    requests: Sequence[Request],
    *,
    options: BenchmarkOptions,
    turn_seconds: float = TURN_SECONDS,
) -> dict[str, Samples]:
    """Send the same requests to every pipeline, in turns.

    The order of two pipelines alternates from turn to turn; that of more is drawn by lot. (A fixed
    place, always in the middle or always next to the largest, moved ratios by 4 %.)

    With traces, every generator takes the recorded number of steps, and the nodes after it read the
    recorded text. So structures are compared, not what they write.

    Args:
        pipelines: Loaded pipelines by name.
        requests: What to send; they are sent again from the first when all were sent.
        options: How many requests and for how long; `threads` and `loads` are of no effect here.
        turn_seconds: Seconds of a turn, about.

    Returns:
        What was observed of each pipeline, by name.
    """
    sender = _RequestSender(pipelines, requests, options=options)
    slowest_seconds = sender.warm_up()
    requests_per_turn = max(1, round(turn_seconds / slowest_seconds))
    takes_turns = len(pipelines) > 1 and slowest_seconds < turn_seconds
    uncounted_requests = 1 if takes_turns else 0
    names = list(pipelines)
    generator = random.Random(options.first_request)
    start_seconds = time.perf_counter()
    sent = 0
    while sent < options.max_requests:
        time_is_over = time.perf_counter() - start_seconds >= options.seconds
        if sent >= options.min_requests and time_is_over:
            break
        if len(names) == 2:
            names.reverse()
        else:
            generator.shuffle(names)
        turn_end = min(sent + requests_per_turn, options.max_requests)
        for name in names:
            for number in range(sent - uncounted_requests, sent):
                sender.send_request(name, number)
            for number in range(sent, turn_end):
                sender.record_request(name, number)
        sent = turn_end
    sender.stop_replay()
    sender.close_load()
    return sender.samples


class _RequestSender:
    """Sends requests to pipelines by name and keeps what the counted ones took."""

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        requests: Sequence[Request],
        *,
        options: BenchmarkOptions,
    ):
        self.pipelines = pipelines
        self.batches = group_requests(requests, options.batch)
        self.options = options
        self.samples: dict[str, Samples] = {}
        """What was observed of each pipeline so far."""
        self.writers: dict[str, dict[str, TextWriter]] = {}
        """The generators of each pipeline, by node."""
        for name, pipeline in pipelines.items():
            self.samples[name] = Samples()
            self.writers[name] = pipeline.writers

    def warm_up(self) -> float:
        """Send the warm-up requests; returns the seconds of the slowest pipeline's quickest."""
        slowest_seconds = 0.0
        for name in self.pipelines:
            seconds: list[float] = []
            count = max(1, self.options.warmup)
            for number in range(-count, 0):
                seconds.append(self.send_request(name, number))
            slowest_seconds = max(slowest_seconds, min(seconds))
        return slowest_seconds

    def send_request(self, name: str, number: int) -> float:
        """Send a request, or a batch, to a pipeline; returns the seconds it took."""
        position = self.find_position(number)
        for node_name, writer in self.writers[name].items():
            traces = self.options.traces
            writer.replay = traces[position][node_name] if traces else ()
        pipeline = self.pipelines[name]
        batch = self.batches[position]
        start_seconds = time.perf_counter()
        if len(batch) == 1:
            pipeline(**batch[0])
        else:
            pipeline.answer_batch(batch)
        return time.perf_counter() - start_seconds

    def record_request(self, name: str, number: int) -> None:
        """Send a request to a pipeline and add what it took to the samples."""
        pipeline = self.pipelines[name]
        samples = self.samples[name]
        calls_before = _count_calls(pipeline)
        seconds = self.send_request(name, number)
        samples.add_request(pipeline, seconds)
        samples.add_calls(calls_before, _count_calls(pipeline))
        # Traces are kept of the first pass over the requests alone, and only from its start: their
        # place in the list is the index of the request.
        if self.find_position(number) == number:
            traces: GenerationTraces = {}
            for node_name, writer in self.writers[name].items():
                traces[node_name] = tuple(writer.traces)
            samples.traces.append(traces)

    def find_position(self, number: int) -> int:
        """Return the index of the request that has a number; numbers below 0 are warm-up."""
        return (self.options.first_request + number) % len(self.batches)

    def stop_replay(self) -> None:
        """Let every generator write for itself again."""
        for writers in self.writers.values():
            for writer in writers.values():
                writer.replay = ()

    def close_load(self) -> None:
        """Note how many requests of each pipeline this load has counted."""
        for samples in self.samples.values():
            samples.load_requests = [len(samples.ms)]


def count_batches(requests: Sequence[Request], batch: int) -> int:
    """Count the different batches of some requests, one at least."""
    return max(1, len(requests) // batch)


def group_requests(requests: Sequence[Request], batch: int) -> list[list[Request]]:
    """Group requests into batches, in their order. What does not fill a batch is left out.

    Where there are fewer requests than a batch has, they come again within it.

    Args:
        requests: The requests.
        batch: Requests of a batch.
    """
    batches: list[list[Request]] = []
    for number in range(count_batches(requests, batch)):
        start = number * batch
        places = range(start, start + batch)
        batches.append([requests[place % len(requests)] for place in places])
    return batches


def _count_calls(pipeline: Pipeline) -> dict[str, int]:
    """Return the session calls of a pipeline so far, by `node/graph`."""
    calls: dict[str, int] = {}
    for node_name, sessions in pipeline.sessions.items():
        for graph_name, session in sessions.items():
            calls[f"{node_name}/{graph_name}"] = session.calls
    return calls


def _join_rows(
    first: dict[str, list[Figure]], second: dict[str, list[Figure]]
) -> dict[str, list[Figure]]:
    """Return the rows of `second`, each behind the row of `first` that has the same name."""
    joined_samples: dict[str, list[Figure]] = {}
    for name, row in second.items():
        joined_samples[name] = first.get(name, []) + row
    return joined_samples
