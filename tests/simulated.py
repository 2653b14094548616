"""A machine made of arithmetic: what a run measures follows from sizes and counts, so every run is the same run."""

from __future__ import annotations

from pathlib import Path

from mmcompress.kinds.text_decoder.deployed import TextDecoder
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.device_table import DeviceTable, TableRow, choose_measured_sizes
from mmcompress.measure.cost_model.plan import Export
from mmcompress.measure.latency.bench import Samples
from mmcompress.measure.latency.benchmark_in_subprocess import BenchmarkJob, load_requests
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import fingerprint_device

CALL_MS = 0.01
"""What a call of a graph takes whatever its size."""
MS_PER_MB = 2.0
REQUESTS_MS = 0.05
"""What a request takes beside its graphs."""
SPEED = {"fp32": 1.0, "int8": 0.6, "uint8": 0.7}
MOST_REQUESTS = 12


class StoppedClock:
    """A clock that stands still: nothing ends because time has passed."""

    def now(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        pass


def graph_ms(file: Path) -> float:
    return CALL_MS + MS_PER_MB * file.stat().st_size / 1e6


class SimulatedBenchmarker(Benchmarker):
    """Latencies from the sizes of files, and from the shapes of blocks."""

    def complete_device_table(self, needs, threads, *, precisions, progress):
        largest: dict = {}
        for need in needs:
            have_units, have_step = largest.get(need.key, (0, 1))
            largest[need.key] = (max(have_units, need.units), max(have_step, need.granularity))
        rows = []
        for key, (units, step) in sorted(largest.items()):
            sizes = choose_measured_sizes(units, step)
            span = 1 if key.kind == "conv" else key.keys
            for precision in precisions:
                per_unit = 1e-7 * key.batch * key.positions * key.head * (4 * key.width + span)
                ms = tuple(SPEED.get(precision, 0.8) * (1e-3 + per_unit * size) for size in sizes)
                rows.append(TableRow(key=key, precision=precision, units=sizes, ms=ms))
        return DeviceTable(device=fingerprint_device(threads), threads=threads, rows=tuple(rows))

    def time_export(self, export: Export, folder: Path, *, threads: int) -> float:
        return sum(call.calls * graph_ms(folder / call.file) for call in export.graphs.values())

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        requests = load_requests(folder, job.requests)
        return {name: self.observe(Path(at), job, requests) for name, at in job.bundles.items()}

    def observe(self, bundle: Path, job: BenchmarkJob, requests: list) -> Samples:
        pipeline, found = load_bundle(bundle, job.options.threads), Samples()
        cost = {}
        for node, entry in pipeline.manifest["graph"]["nodes"].items():
            cost |= {
                (node, graph): graph_ms(bundle / file)
                for graph, file in entry.get("files", {}).items()
            }
        writers = {n: node for n, node in pipeline.nodes.items() if isinstance(node, TextDecoder)}
        for i in range(min(job.options.max_requests, MOST_REQUESTS)):
            at = (job.options.first_request + i) % len(requests)
            for name, node in writers.items():
                node.replay = job.options.traces[at][name] if job.options.traces else ()
            before = {key: pipeline.sessions[key[0]][key[1]].calls for key in cost}
            pipeline(**requests[at])
            made = {key: pipeline.sessions[key[0]][key[1]].calls - n for key, n in before.items()}
            inside = {n: sum(made[k] * cost[k] for k in cost if k[0] == n) for n in pipeline.nodes}
            total = sum(inside.values()) + REQUESTS_MS
            found.ms.append(total)
            found.session_shares.append(sum(inside.values()) / total)
            for n, ms in inside.items():
                found.nodes.setdefault(n, []).append(ms)
                found.in_session.setdefault(n, []).append(ms)
            for (n, graph), calls in made.items():
                found.calls[f"{n}/{graph}"] = found.calls.get(f"{n}/{graph}", 0) + calls
            if at == i:
                found.traces.append({n: tuple(node.traces) for n, node in writers.items()})
        return found

    def measure_memory_mb(self, bundle: Path | None = None) -> float:
        files = bundle.rglob("*") if bundle else ()
        return 100.0 + sum(f.stat().st_size for f in files if f.is_file()) / 1e6
