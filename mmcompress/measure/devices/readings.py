"""What the latency predictor is made of, on whatever device it was measured: whole exports timed, the table, the fit.

A `Kit` is a folder that another device measures (it needs neither torch nor the models' libraries), `Readings` are the
JSON it gives back. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcompress.measure.cost_model.device_table import DeviceTable, complete_table
from mmcompress.measure.cost_model.fit_predictor import (
    PipelineMeasurement,
    compute_node_ratios,
    fit_predictor,
)
from mmcompress.measure.cost_model.plan import Export, MeasurementPlan, list_reference_bundles
from mmcompress.measure.cost_model.predictor import Predictor, list_table_needs
from mmcompress.measure.cost_model.time_export import time_export
from mmcompress.measure.devices.kit import open_kit
from mmcompress.measure.latency.bench import (
    COMPARISON_SECONDS,
    MAX_REQUESTS_FACTOR,
    BenchmarkOptions,
)
from mmcompress.measure.latency.bench_with_replay import bench_with_replay
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated, load_requests
from mmcompress.runtime.bundle import hash_bundle_models
from mmcompress.runtime.machine import describe_cpu, fingerprint_device, list_package_versions
from mmcompress.storage import write_record

Progress = Callable[[str, float], None]


SILENT: Progress = lambda what, share: None


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
        return fit_predictor(
            self.plan,
            self.table,
            exports=self.exports,
            export_ms=self.export_ms,
            dense=self.baseline,
            node_ratios=self.node_ratios,
        )


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


def measure_kit(folder: Path, progress: Progress = SILENT) -> Readings:
    """Measure a kit on this device: the dense pipeline, the device table, every export. Raises `DataError`."""
    kit = open_kit(folder)
    progress("the dense pipeline", 0.0)
    requests, alone = load_requests(folder), {"dense": folder / "baseline"}
    options = BenchmarkOptions(
        warmup=kit.warmup, max_requests=kit.requests, threads=kit.threads, loads=1
    )
    whole = bench_repeated(alone, requests, options=options)["dense"].summarize()
    rates = compute_node_ratios(
        bench_with_replay(
            list_reference_bundles(folder, kit.plan.reference_names),
            requests,
            options=replace(options, traces=whole.traces),
            dense_ms=whole.latency.p50,
        )
    )
    say = lambda what, share: progress(what, 0.1 + 0.6 * share)
    wanted = list_table_needs(kit.plan.deployed, kit.plan.windows)
    found = complete_table(wanted, kit.threads, progress=say, precisions=kit.plan.every_precision)
    ms = []
    for i, e in enumerate(kit.exports):
        progress(f"whole export of {e.node}, {e.precision}", 0.7 + 0.3 * i / len(kit.exports))
        ms.append(time_export(e, folder, threads=kit.threads))
    facts = (fingerprint_device(kit.threads), describe_cpu(), list_package_versions(), kit.threads)
    of = (kit.pipeline, hash_bundle_models(folder / "baseline"))
    return Readings(
        *facts,
        *of,
        kit.plan,
        kit.exports,
        tuple(ms),
        rates,
        PipelineMeasurement.from_latency(whole),
        found,
    )


def check_bundle(folder: Path, bundle: Path) -> BundleCheck:
    """Measure a bundle beside the dense one of a kit, on this device, as a run here measures its own."""
    kit = open_kit(folder)
    pair = {"dense": folder / "baseline", "new": bundle}
    options = BenchmarkOptions(
        warmup=kit.warmup,
        max_requests=MAX_REQUESTS_FACTOR * kit.requests,
        min_requests=kit.requests,
        seconds=2 * COMPARISON_SECONDS,
        threads=kit.threads,
    )
    samples = bench_repeated(pair, load_requests(folder), options=options)
    found = [PipelineMeasurement.from_latency(sample.summarize()) for sample in samples.values()]
    facts = (fingerprint_device(kit.threads), describe_cpu(), list_package_versions(), kit.threads)
    return BundleCheck(
        *facts, hash_bundle_models(folder / "baseline"), hash_bundle_models(bundle), *found
    )


def save_readings(record: Readings | BundleCheck, path: Path) -> Path:
    return write_record(path, record)
