"""Latency as a user would feel it: wall time, interleaved between what is compared, medians with spread."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmcompress.kinds.text_decoder.deployed import TextDecoder
from mmcompress.runtime.graph import Pipeline
from mmcompress.runtime.replay import GenerationTrace
from mmcompress.stats import Latency, summarize_latency

GenerationTraces = dict[str, tuple[GenerationTrace, ...]]
"""What every generator writes of one request, window by window."""


@dataclass(frozen=True, kw_only=True)
class PipelineLatency:
    """One pipeline's figures: whole requests, nodes, and the share of the time spent inside model sessions."""

    latency: Latency
    nodes: dict[str, Latency]
    model_share: float
    calls: dict[str, float]
    """Session calls per request by `node/graph`: 1, or the mean number of decode steps."""
    samples: tuple[float, ...] = ()
    """Milliseconds of every request, in the order they were sent."""
    in_session_ms: dict[str, float] = field(default_factory=dict)
    """p50 of the milliseconds spent in the sessions of each node."""
    traces: tuple[GenerationTraces, ...] = ()
    """What was written of each request, as far as all of them were sent."""


COMPARISON_SECONDS, MIN_REQUESTS, MAX_REQUESTS_FACTOR = 30.0, 12, 10
"""How long two pipelines are compared, if that is enough for a dozen requests, or as many as the spec asks for; and no
more than so many times as many. A busy machine slows a small model down more than a large one, for seconds at a
time: on one such, ratios of medians had a spread (one sigma) of 2.8 % over 10 s, 2.6 % over 20 s, 0.5 % over 30 s."""


TURN_SECONDS = 0.1
"""Seconds that a pipeline answers for before it is another one's turn. The first request after the other's is not
counted: it finds its weights thrown out of the caches, which takes a small pipeline a fifth of its time and does not
happen to one that serves alone. Where requests take longer than that, every one counts and turns are of one."""


BUNDLE_LOADS = 4
"""How often quick pipelines are loaded anew while they are measured. Where its weights come to lie in memory makes one
load quicker than the next for as long as it lives: the ratio of one pair of bundles had a spread (one sigma) of 2 %
from load to load, and of 0.8 % within one."""


def comparison_seconds(dense_ms: float) -> float:
    """Seconds that pipelines are compared for: twice as many where every request is a turn of its own. (30 seconds are
    40 requests of half a second: ratios of their medians had a spread (one sigma) of 1.5 to 2 %.)"""
    return COMPARISON_SECONDS if dense_ms < 1e3 * TURN_SECONDS else 2 * COMPARISON_SECONDS


def has_time_budget(dense_ms: float) -> bool:
    """Whether a pipeline is quick enough to be measured for more than one comparison needs."""
    return 3 * MIN_REQUESTS * dense_ms < 1e3 * COMPARISON_SECONDS


def bench_repeats(dense_ms: float) -> int:
    """How often pipelines compared to such a dense one are loaded."""
    return BUNDLE_LOADS if has_time_budget(dense_ms) else 1


def _generators(pipeline: Pipeline) -> dict[str, TextDecoder]:
    return {n: node for n, node in pipeline.nodes.items() if isinstance(node, TextDecoder)}


@dataclass(kw_only=True)
class Samples:
    """What was observed of one pipeline, request by request; those of several sittings add up."""

    ms: list[float] = field(default_factory=list)
    session_shares: list[float] = field(default_factory=list)
    nodes: dict[str, list[float]] = field(default_factory=dict)
    in_session: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    traces: list[GenerationTraces] = field(default_factory=list)

    def __add__(self, other: Samples) -> Samples:
        both = lambda a, b: {k: a.get(k, []) + v for k, v in b.items()}
        calls = {k: self.calls.get(k, 0) + c for k, c in other.calls.items()}
        nodes, inside = both(self.nodes, other.nodes), both(self.in_session, other.in_session)
        return Samples(
            ms=self.ms + other.ms,
            session_shares=self.session_shares + other.session_shares,
            nodes=nodes,
            in_session=inside,
            calls=calls,
            traces=max(self.traces, other.traces, key=len),
        )

    def add_request(self, pipeline: Pipeline, seconds: float) -> None:
        self.ms.append(seconds * 1e3)
        self.session_shares.append(pipeline.session_seconds / seconds)
        for k, s in pipeline.node_seconds.items():
            self.nodes.setdefault(k, []).append(s * 1e3)
            self.in_session.setdefault(k, []).append(pipeline.model_seconds[k] * 1e3)

    def add_calls(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        """Add the calls of one request."""
        for k, c in after.items():
            self.calls[k] = self.calls.get(k, 0) + c - before[k]

    def summarize(self) -> PipelineLatency:
        return PipelineLatency(
            latency=summarize_latency(self.ms),
            nodes={k: summarize_latency(v) for k, v in self.nodes.items()},
            model_share=float(np.median(self.session_shares)),
            calls={k: c / len(self.ms) for k, c in self.calls.items()},
            samples=tuple(self.ms),
            in_session_ms={k: float(np.median(v)) for k, v in self.in_session.items()},
            traces=tuple(self.traces),
        )


def bench_pipelines(
    pipelines: Mapping[str, Pipeline],
    requests: Sequence[dict[str, Any]],
    warmup: int,
    rounds: int,
    said: Sequence[GenerationTraces] = (),
    seconds: float = float("inf"),
    least: int = MIN_REQUESTS,
    first: int = 0,
) -> dict[str, Samples]:
    """Send the same requests to every pipeline in turns, from the `first` on; of two the order alternates from turn to
    turn, of more it is drawn by lot. (Always in the middle, or always next to the largest, is a place of its own: it
    moved ratios by 4 %.)

    After so many `seconds` it ends with the requests it has, `least` of them or more. How long a turn is: `TURN`.

    With what is `said` (a script a request) every generator takes exactly so many steps, and what follows it reads just
    that: structures are compared, not what they say.
    """
    generators = {n: _generators(p) for n, p in pipelines.items()}
    names, found = list(pipelines), {n: Samples() for n in pipelines}

    def send(name: str, i: int, counted: bool) -> float:
        pipeline, at = pipelines[name], (first + i) % len(requests)
        for g, node in generators[name].items():
            node.replay = said[at][g] if said else ()
        before = _calls(pipeline)
        start = time.perf_counter()
        pipeline(**requests[at])
        spent = time.perf_counter() - start
        if counted:
            found[name].add_request(pipeline, spent)
            found[name].add_calls(before, _calls(pipeline))
            if at == i:
                found[name].traces.append(
                    {g: tuple(node.traces) for g, node in generators[name].items()}
                )
        return spent

    slowest = max(min(send(n, i, False) for i in range(-max(1, warmup), 0)) for n in names)
    turn, lead = max(1, round(TURN_SECONDS / slowest)), len(names) > 1 and slowest < TURN_SECONDS
    began, sent, lot = time.perf_counter(), 0, random.Random(first)
    while sent < rounds and (sent < least or time.perf_counter() - began < seconds):
        names.reverse() if len(names) == 2 else lot.shuffle(names)
        many = min(turn, rounds - sent)
        for name in names:
            for i in range(sent - lead, sent + many):
                send(name, i, i >= sent)
        sent += many
    for node in (node for by in generators.values() for node in by.values()):
        node.replay = ()
    return found


def _calls(pipeline: Pipeline) -> dict[str, int]:
    return {
        f"{n}/{g}": s.calls for n, graphs in pipeline.sessions.items() for g, s in graphs.items()
    }
