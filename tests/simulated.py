"""A machine made of arithmetic: what a run measures follows from sizes and counts.

So every run is the same run.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.device_table import DeviceTable, TableRow, choose_measured_sizes
from mmcompress.measure.cost_model.plan import Export
from mmcompress.measure.latency.bench import (
    BenchmarkOptions,
    GenerationTraces,
    Samples,
    group_requests,
)
from mmcompress.measure.latency.benchmark_in_subprocess import (
    BenchmarkJob,
    bench_in_process,
    load_requests,
)
from mmcompress.runtime.graph import Pipeline, load_bundle
from mmcompress.runtime.machine import fingerprint_device
from mmcompress.runtime.timing import SystemClock

CALL_MS = 0.01
"""Milliseconds of a session call, whatever the size of its graph."""

MS_PER_MB = 2.0
"""Milliseconds of a session call for every MB of its file."""

REQUEST_MS = 0.05
"""Milliseconds of a request outside its sessions."""

PRECISION_FACTORS = {"fp32": 1.0, "int8": 0.6, "uint8": 0.7}
"""Latency of a block in a precision over that in fp32; 0.8 in any other."""

MAX_REQUESTS = 12
"""Requests counted at most: they all take the same time."""


class StoppedClock:
    """A clock that stands still: nothing ends because time has passed."""

    def read_seconds(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        pass


class ImpatientClock(SystemClock):
    """The clock of this machine without pauses: a test does not wait for a busy machine to become calm."""

    def sleep(self, seconds: float) -> None:
        pass


def compute_call_ms(file: Path) -> float:
    """Return the milliseconds of one call of a graph."""
    return CALL_MS + MS_PER_MB * file.stat().st_size / 1e6


class SimulatedBenchmarker(Benchmarker):
    """Latencies from the sizes of files, and from the shapes of blocks."""

    def complete_device_table(self, needs, threads, *, precisions, progress, provider="cpu"):
        largest_needs: dict = {}
        for need in needs:
            known_units, known_step = largest_needs.get(need.key, (0, 1))
            largest_needs[need.key] = (
                max(known_units, need.units),
                max(known_step, need.granularity),
            )
        rows = []
        for key, (units, step) in sorted(largest_needs.items()):
            sizes = choose_measured_sizes(units, step)
            span = 1 if key.kind == "conv" else key.keys
            ms_per_unit = 1e-7 * key.batch * key.positions * key.head * (4 * key.width + span)
            for precision in precisions:
                factor = PRECISION_FACTORS.get(precision, 0.8)
                ms = tuple(factor * (1e-3 + ms_per_unit * size) for size in sizes)
                rows.append(TableRow(key=key, precision=precision, units=sizes, ms=ms))
        return DeviceTable(device=fingerprint_device(threads), threads=threads, rows=tuple(rows))

    def time_export(self, export: Export, folder: Path, *, threads: int, provider="cpu") -> float:
        return sum(
            call.calls * compute_call_ms(folder / call.file) for call in export.graphs.values()
        )

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        requests = load_requests(folder, job.requests)
        samples = {}
        for name, bundle in job.bundles.items():
            samples[name] = simulate_bundle(Path(bundle), requests, options=job.options)
        return samples

    def measure_memory_mb(self, bundle: Path | None = None) -> float:
        files = bundle.rglob("*") if bundle else ()
        return 100.0 + sum(file.stat().st_size for file in files if file.is_file()) / 1e6


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one bundle does for one request: always the same, so it is asked once."""

    calls: dict[tuple[str, str], int]
    """Session calls by node and graph."""
    traces: GenerationTraces
    """What the generators wrote."""


ANSWERS: dict[tuple[str, str, str], Answer] = {}
"""By what decides the calls, request, and what the generators follow.

Without a trace the weights decide what is written: the manifest holds the hash of every file. With
one, only the graphs and how they are connected matter.
"""


def hash_request(request: dict) -> str:
    """Return a digest of the arrays of a request, of the files that it names, or of its texts."""
    digest = hashlib.sha256()
    for name, value in sorted(request.items()):
        digest.update(name.encode())
        if isinstance(value, np.ndarray):
            digest.update(repr((value.dtype, value.shape)).encode() + value.tobytes())
        elif Path(value).is_file():
            digest.update(Path(value).read_bytes())
        else:
            digest.update(str(value).encode())
    return digest.hexdigest()


class SimulatedBundle:
    """A bundle that is loaded when a request comes that it has not answered before."""

    def __init__(self, bundle: Path, threads: int):
        self.bundle = bundle
        self.threads = threads
        self.manifest_text = (bundle / "manifest.json").read_text()
        self.manifest = json.loads(self.manifest_text)

    @cached_property
    def pipeline(self) -> Pipeline:
        return load_bundle(self.bundle, self.threads)

    def ask(self, batch: list[dict], *, trace: GenerationTraces | None) -> Answer:
        """Send a batch, or return what was observed when it was sent before."""
        decisive = self.manifest_text if trace is None else self._describe_graphs()
        hashes = " ".join(hash_request(request) for request in batch)
        key = (decisive, hashes, repr(trace))
        if key not in ANSWERS:
            ANSWERS[key] = self._observe(batch, trace=trace)
        return ANSWERS[key]

    def _observe(self, batch: list[dict], *, trace: GenerationTraces | None) -> Answer:
        pipeline = self.pipeline
        for node_name, decoder in pipeline.writers.items():
            decoder.replay = trace[node_name] if trace is not None else ()
        before = self._count_calls()
        pipeline.answer_batch(batch)
        after = self._count_calls()
        return Answer(
            calls={graph: after[graph] - count for graph, count in before.items()},
            traces={n: tuple(decoder.traces) for n, decoder in pipeline.writers.items()},
        )

    def _describe_graphs(self) -> str:
        """Return the nodes, their graphs, their connections and how their texts are generated."""
        nodes = {}
        for node_name, entry in self.manifest["graph"]["nodes"].items():
            generation = entry.get("config", {}).get("generation")
            graphs = sorted(entry.get("files", {}))
            nodes[node_name] = (entry["kind"], entry["inputs"], graphs, generation)
        return json.dumps(nodes)

    def _count_calls(self) -> dict[tuple[str, str], int]:
        counts = {}
        for node_name, entry in self.manifest["graph"]["nodes"].items():
            for graph_name in entry.get("files", {}):
                session = self.pipeline.sessions[node_name][graph_name]
                counts[node_name, graph_name] = session.calls
        return counts


def simulate_bundle(bundle: Path, requests: list, *, options: BenchmarkOptions) -> Samples:
    """Send requests to a bundle, and compute what they take from the calls of its sessions."""
    simulated = SimulatedBundle(bundle, options.threads)
    node_entries = simulated.manifest["graph"]["nodes"]
    call_ms = {}
    for node_name, entry in node_entries.items():
        for graph_name, file_name in entry.get("files", {}).items():
            call_ms[node_name, graph_name] = compute_call_ms(bundle / file_name)
    batches = group_requests(requests, options.batch)
    samples = Samples()
    for number in range(min(options.max_requests, MAX_REQUESTS)):
        position = (options.first_request + number) % len(batches)
        trace = options.traces[position] if options.traces else None
        answer = simulated.ask(batches[position], trace=trace)
        session_ms = dict.fromkeys(node_entries, 0)
        for graph, count in answer.calls.items():
            session_ms[graph[0]] += count * call_ms[graph]
        in_sessions_ms = sum(session_ms.values())
        request_ms = in_sessions_ms + REQUEST_MS
        samples.ms.append(request_ms)
        samples.session_shares.append(in_sessions_ms / request_ms)
        for node_name, node_ms in session_ms.items():
            samples.nodes.setdefault(node_name, []).append(node_ms)
            samples.in_session.setdefault(node_name, []).append(node_ms)
        for node_name, written in answer.traces.items():
            steps = sum(text.steps for text in written)
            samples.decode_steps.setdefault(node_name, []).append(steps)
        for (node_name, graph_name), count in answer.calls.items():
            key = f"{node_name}/{graph_name}"
            samples.calls[key] = samples.calls.get(key, 0) + count
        if position == number:
            samples.traces.append(answer.traces)
    return samples


class InProcessBenchmarker(Benchmarker):
    """This machine, measured in this process: to start another takes longer than tiny models do."""

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        return bench_in_process(job, folder)


class NoisyBenchmarker(SimulatedBenchmarker):
    """A simulated machine whose every measurement is off by some 15 %, by lot."""

    def __init__(self, seed: int):
        self.lot = random.Random(seed)

    def time_export(self, export: Export, folder: Path, *, threads: int, provider="cpu") -> float:
        return self.draw_factor() * super().time_export(export, folder, threads=threads)

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        samples = super().benchmark_bundles(job, folder)
        return {name: self.disturb(one) for name, one in samples.items()}

    def disturb(self, samples: Samples) -> Samples:
        factor = self.draw_factor()
        # One measurement in five is interrupted, and no node accounts for the time.
        pause = self.lot.uniform(1.0, 4.0) if self.lot.random() < 0.2 else 1.0
        return replace(
            samples,
            ms=[factor * pause * ms for ms in samples.ms],
            nodes={node: [factor * ms for ms in row] for node, row in samples.nodes.items()},
            in_session={
                node: [factor * ms for ms in row] for node, row in samples.in_session.items()
            },
        )

    def draw_factor(self) -> float:
        return self.lot.lognormvariate(0.0, 0.15)
