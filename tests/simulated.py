"""A machine made of arithmetic: what a run measures follows from sizes and counts.

So every run is the same run.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.device_table import DeviceTable, TableRow, choose_measured_sizes
from mmcompress.measure.cost_model.plan import Export
from mmcompress.measure.latency.bench import BenchmarkOptions, Samples
from mmcompress.measure.latency.benchmark_in_subprocess import (
    BenchmarkJob,
    bench_in_process,
    load_requests,
)
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import fingerprint_device

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

    def now(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        pass


def compute_call_ms(file: Path) -> float:
    """Return the milliseconds of one call of a graph."""
    return CALL_MS + MS_PER_MB * file.stat().st_size / 1e6


class SimulatedBenchmarker(Benchmarker):
    """Latencies from the sizes of files, and from the shapes of blocks."""

    def complete_device_table(self, needs, threads, *, precisions, progress):
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

    def time_export(self, export: Export, folder: Path, *, threads: int) -> float:
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


def simulate_bundle(bundle: Path, requests: list, *, options: BenchmarkOptions) -> Samples:
    """Send requests to a bundle, and compute what they take from the calls of its sessions."""
    pipeline = load_bundle(bundle, options.threads)
    call_ms = {}
    for node_name, entry in pipeline.manifest["graph"]["nodes"].items():
        for graph_name, file_name in entry.get("files", {}).items():
            call_ms[node_name, graph_name] = compute_call_ms(bundle / file_name)
    samples = Samples()
    for number in range(min(options.max_requests, MAX_REQUESTS)):
        position = (options.first_request + number) % len(requests)
        for node_name, decoder in pipeline.writers.items():
            decoder.replay = options.traces[position][node_name] if options.traces else ()
        calls_before = {graph: pipeline.sessions[graph[0]][graph[1]].calls for graph in call_ms}
        pipeline(**requests[position])
        calls = {}
        session_ms = dict.fromkeys(pipeline.nodes, 0)
        for graph, count_before in calls_before.items():
            node_name, graph_name = graph
            calls[graph] = pipeline.sessions[node_name][graph_name].calls - count_before
            session_ms[node_name] += calls[graph] * call_ms[graph]
        in_sessions_ms = sum(session_ms.values())
        request_ms = in_sessions_ms + REQUEST_MS
        samples.ms.append(request_ms)
        samples.session_shares.append(in_sessions_ms / request_ms)
        for node_name, node_ms in session_ms.items():
            samples.nodes.setdefault(node_name, []).append(node_ms)
            samples.in_session.setdefault(node_name, []).append(node_ms)
        for (node_name, graph_name), count in calls.items():
            key = f"{node_name}/{graph_name}"
            samples.calls[key] = samples.calls.get(key, 0) + count
        if position == number:
            samples.traces.append(
                {n: tuple(decoder.traces) for n, decoder in pipeline.writers.items()}
            )
    return samples


class InProcessBenchmarker(Benchmarker):
    """This machine, measured in this process: to start another takes longer than tiny models do."""

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        return bench_in_process(job, folder)


class MoodyBenchmarker(SimulatedBenchmarker):
    """A simulated machine whose every measurement is off by some 15 %, by lot."""

    def __init__(self, seed: int):
        self.lot = random.Random(seed)

    def time_export(self, export: Export, folder: Path, *, threads: int) -> float:
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
