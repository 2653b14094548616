"""What the latency predictor is made of, on whatever device it was measured: whole exports timed, the table, the fit.

A `Kit` is a folder that another device measures (it needs neither torch nor the models' libraries), `Readings` are the
JSON it gives back. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import DataError
from mmcompress.measure import table
from mmcompress.measure.apart import BenchmarkJob, bench_repeated, load_requests
from mmcompress.measure.latency import (
    COMPARISON_SECONDS,
    MAX_REQUESTS_FACTOR,
    GenerationTraces,
    PipelineLatency,
    Samples,
    bench_repeats,
    comparison_seconds,
    min_of_medians,
)
from mmcompress.measure.machine import device_fingerprint, package_versions
from mmcompress.measure.predict import DeployedBlock, LinearFit, PositionWindow, Predictor, list_table_needs
from mmcompress.measure.table import DeviceTable
from mmcompress.records import Latency, read_record, write_record
from mmcompress.runtime.bundle import bundle_identity
from mmcompress.runtime.cpu import describe_cpu
from mmcompress.runtime.sessions import open_session

QUANTIZED_FOLDER = "rounded"
"""The folder of pipelines that the dense one is measured beside: in other precisions, and smaller ones."""
Progress = Callable[[str, float], None]
SILENT: Progress = lambda what, share: None


@dataclass(frozen=True)
class GraphCall:
    """One graph of an export: its file, the inputs it gets in deployment (.npz), and its calls per request."""

    file: str
    feed: str
    calls: float


@dataclass(frozen=True)
class Export:
    """A node exported whole. `kept`: its units; `cut`: positions gone; `graphs`: what a request runs."""

    node: str
    precision: str
    kept_units: dict[str, int]
    cut_positions: int
    params_m: float
    size_mb: float
    graphs: dict[str, GraphCall]


@dataclass(frozen=True)
class MeasurementPlan:
    """What has to be known of a device: blocks with their shapes, windows, precisions by node."""

    deployed: dict[str, tuple[DeployedBlock, ...]]
    windows: dict[str, PositionWindow]
    precisions: dict[str, tuple[str, ...]]
    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Where branches run in parallel, the nodes that each waits for."""
    small_structures: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """Units of the smaller pipelines by name and node: with a share of all blocks, and without some of them."""

    @property
    def reference_names(self) -> tuple[str, ...]:
        """The pipelines measured beside the dense one, by folder."""
        other = tuple(p for p in self.every_precision if p != "fp32")
        return other + tuple(
            small_pipeline_name(name, p) for name in self.small_structures for p in self.every_precision
        )

    @property
    def every_precision(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p for by in self.precisions.values() for p in by))

    def blocks(self) -> dict[str, list[tuple[Any, ...]]]:
        """Name, units, kind, widths and batch of every block by node, and its positions where those do not depend on
        how much a generator writes."""
        shape = lambda p: (*p.key[:3], p.key[5], p.key[3] if p.calls == 1 and not p.window else 0)
        return {n: [(p.name, p.units, *shape(p)) for p in row] for n, row in self.deployed.items()}


def small_pipeline_name(name: str, precision: str) -> str:
    """The folder of a smaller pipeline in a precision."""
    return f"{name}-{precision}"


@dataclass(frozen=True)
class PipelineMeasurement:
    """A pipeline end to end: latency, its nodes, the share spent inside models, session calls per request, and the p50
    of the milliseconds inside the sessions of each node."""

    latency: Latency
    nodes: dict[str, Latency]
    model_share: float
    calls: dict[str, float]
    in_session_ms: dict[str, float]

    @classmethod
    def from_latency(cls, m: PipelineLatency) -> PipelineMeasurement:
        return cls(m.latency, m.nodes, m.model_share, m.calls, m.in_session_ms)


def time_export(e: Export, folder: Path, threads: int) -> float:
    """Milliseconds one request spends in the sessions of an export."""
    total = 0.0
    for call in e.graphs.values():
        run = open_session(folder / call.file, threads)
        used = {i.name for i in run.get_inputs()}
        with np.load(folder / call.feed, allow_pickle=False) as given:
            feed = {k: given[k] for k in given.files if k in used}
        total += call.calls * min_of_medians(partial(run.run, None, feed), 5, 100, 0.4)
    return total


NodeRatios = Mapping[str, Mapping[str, float]]
"""Pipeline (a precision, or a smaller one in it) -> node: its time over that of the dense one beside it."""


def reference_bundles(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The dense bundle and those measured beside it, by name."""
    return {"fp32": folder / "baseline", **{n: folder / QUANTIZED_FOLDER / n for n in names}}


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
    some = select_requests(requests, said, dense_ms)
    how = (warmup, rounds, said, comparison_seconds(dense_ms))
    found = bench_repeated(bundles, threads, some, *how, sittings=bench_repeats(dense_ms), benchmark=benchmark)
    return {n: s.summarize() for n, s in found.items()}


def node_ratios(found: Mapping[str, PipelineLatency]) -> dict[str, dict[str, float]]:
    """Of pipelines measured in turn, what each node takes over the same in fp32, by precision."""
    of = lambda p, n: found[p].nodes[n].p50 / found["fp32"].nodes[n].p50
    return {p: {n: of(p, n) for n, ms in found["fp32"].in_session_ms.items() if ms > 0} for p in found if p != "fp32"}


def select_requests(
    requests: Sequence[dict[str, Any]], said: Sequence[GenerationTraces], dense_ms: float
) -> list[dict[str, Any]]:
    """As many of the requests as there is time for, eight at least; of those whose answers are known."""
    return list(requests[: min(len(said), max(8, int(comparison_seconds(dense_ms) * 1e3 / dense_ms)))])


def fit_predictor(
    plan: MeasurementPlan,
    found: DeviceTable,
    exports: Sequence[Export],
    ms: Sequence[float],
    dense: PipelineMeasurement,
    beside: NodeRatios,
) -> Predictor:
    """Base and scale of every node and precision, from the table and whole exports of `ms` milliseconds each.

    The prediction for the `dense` pipeline is exactly what was measured, as a whole and node by node; `beside` holds
    every other precision, and small nodes, to what was measured of them inside a pipeline.
    """
    draft, rows = Predictor(found, plan.deployed, {}, 0.0, windows=plan.windows, reads=plan.reads), found.lookup()
    affine: dict[str, dict[str, LinearFit]] = {}
    sizes: dict[str, dict[str, LinearFit]] = {}
    whole = {n: dense.nodes[n].p50 for n in plan.deployed}
    # A decode loop moves a cache about that is as large as the structure: where smaller pipelines were measured, what
    # is spent around the sessions of a node is part of its fit; but the features of a sound do not shrink.
    apart = lambda n: not plan.small_structures or (n in plan.windows and plan.windows[n].ordered)
    around = {n: max(whole[n] - dense.in_session_ms[n], 0.0) if apart(n) else 0.0 for n in plan.deployed}
    for n in plan.deployed:
        sizes[n], affine[n] = {}, {}
        for p in plan.precisions[n]:
            mine = [(e, t) for e, t in zip(exports, ms, strict=True) if e.node == n and e.precision == p]
            raw = [draft.table_ms(n, e.kept_units, p, rows, {n: e.cut_positions}) for e, _ in mine]
            a = LinearFit.fit(raw, [t for _, t in mine], [draft.remaining_share(n, e.cut_positions) for e, _ in mine])
            sizes[n][p] = LinearFit.fit([e.params_m for e, _ in mine], [e.size_mb for e, _ in mine])
            # Inside a pipeline sessions find colder caches, and the machine may have been slower then than now: both
            # show as a factor between the time in a node's sessions there and alone. The first export is the whole one.
            share = beside[p][n] if p != "fp32" else 1.0
            spent = lambda rate, n=n: rate * dense.nodes[n].p50 - around[n]
            affine[n][p] = a.scaled(max(spent(share), 1e-3) / (a.base + a.scale * raw[0]))
            less = [
                (by[n], beside[k][n])
                for name, by in plan.small_structures.items()
                if (k := small_pipeline_name(name, p)) in beside
            ]
            if less:  # points from inside a pipeline beat those from alone
                sums = [raw[0], *(draft.table_ms(n, kept, p, rows) for kept, _ in less)]
                left = [len(plan.deployed[n]), *(sum(kept[x.name] > 0 for x in plan.deployed[n]) for kept, _ in less)]
                rates = (share, *(rate for _, rate in less))
                affine[n][p] = (
                    LinearFit.fit_in_pipeline(sums, left, [max(spent(rate), 1e-3) for rate in rates]) or affine[n][p]
                )
    return replace(
        draft,
        fits=affine,
        overhead_ms=dense.latency.p50 - draft.critical_path_ms(whole),
        size_fits=sizes,
        outside_sessions_ms=around,
    )


@dataclass(frozen=True)
class Kit:
    """`kit.json`: beside it lie `baseline/`, the same in every other precision in `rounded/`, `requests.npz`, and a
    folder for every structure that was exported."""

    pipeline: str
    threads: int
    warmup: int
    requests: int
    plan: MeasurementPlan
    exports: tuple[Export, ...]


@dataclass(frozen=True)
class Readings:
    """What a device measured of a kit: all that a search for it needs, wherever that runs."""

    device: str
    cpu: dict[str, Any]
    versions: dict[str, str]
    threads: int
    pipeline: str
    dense_identity: str
    """Hash of the models of the dense bundle."""
    plan: MeasurementPlan
    exports: tuple[Export, ...]
    export_ms: tuple[float, ...]
    node_ratios: dict[str, dict[str, float]]
    """See `Shares`."""
    baseline: PipelineMeasurement
    table: DeviceTable

    def fit_predictor(self) -> Predictor:
        return fit_predictor(self.plan, self.table, self.exports, self.export_ms, self.baseline, self.node_ratios)


@dataclass(frozen=True)
class BundleCheck:
    """Two bundles measured on a device, the same requests in turn. `dense` and `bundle`: hashes of their models."""

    device: str
    cpu: dict[str, Any]
    versions: dict[str, str]
    threads: int
    dense: str
    bundle: str
    baseline: PipelineMeasurement
    compressed: PipelineMeasurement


def open_kit(folder: Path) -> Kit:
    """Raises `DataError` for what is no kit."""
    if not (folder / "kit.json").is_file():
        raise DataError(
            f"{folder}: not a kit: it holds no kit.json (mmcompress device kit SPEC --out FOLDER makes one)"
        )
    return read_record(Kit, folder / "kit.json")


def measure_kit(folder: Path, progress: Progress = SILENT) -> Readings:
    """Measure a kit on this device: the dense pipeline, the device table, every export. Raises `DataError`."""
    kit = open_kit(folder)
    progress("the dense pipeline", 0.0)
    requests, alone = load_requests(folder), {"dense": folder / "baseline"}
    whole = bench_repeated(alone, kit.threads, requests, kit.warmup, kit.requests, sittings=1)["dense"].summarize()
    how = (kit.threads, kit.warmup, kit.requests)
    rates = node_ratios(
        bench_with_replay(
            reference_bundles(folder, kit.plan.reference_names), requests, whole.traces, whole.latency.p50, *how
        )
    )
    say = lambda what, share: progress(what, 0.1 + 0.6 * share)
    wanted = list_table_needs(kit.plan.deployed, kit.plan.windows)
    found = table.complete_table(wanted, kit.threads, say, kit.plan.every_precision)
    ms = []
    for i, e in enumerate(kit.exports):
        progress(f"whole export of {e.node}, {e.precision}", 0.7 + 0.3 * i / len(kit.exports))
        ms.append(time_export(e, folder, kit.threads))
    facts = (device_fingerprint(kit.threads), describe_cpu(), package_versions(), kit.threads)
    of = (kit.pipeline, bundle_identity(folder / "baseline"))
    return Readings(
        *facts, *of, kit.plan, kit.exports, tuple(ms), rates, PipelineMeasurement.from_latency(whole), found
    )


def check_bundle(folder: Path, bundle: Path) -> BundleCheck:
    """Measure a bundle beside the dense one of a kit, on this device, as a run here measures its own."""
    kit = open_kit(folder)
    pair = {"dense": folder / "baseline", "new": bundle}
    how = (kit.warmup, MAX_REQUESTS_FACTOR * kit.requests, (), 2 * COMPARISON_SECONDS, kit.requests)
    found = [
        PipelineMeasurement.from_latency(s.summarize())
        for s in bench_repeated(pair, kit.threads, load_requests(folder), *how).values()
    ]
    facts = (device_fingerprint(kit.threads), describe_cpu(), package_versions(), kit.threads)
    return BundleCheck(*facts, bundle_identity(folder / "baseline"), bundle_identity(bundle), *found)


def save_readings(record: Readings | BundleCheck, path: Path) -> Path:
    return write_record(path, record)
