"""Measures a kit on the device that it was carried to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.device_table import DeviceTable
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement, compute_node_ratios
from mmcompress.measure.cost_model.plan import BASELINE_FOLDER, list_reference_bundles
from mmcompress.measure.cost_model.predictor import list_table_needs
from mmcompress.measure.devices.kit import Kit, open_kit
from mmcompress.measure.devices.readings import Readings
from mmcompress.measure.latency.bench import BenchmarkOptions
from mmcompress.measure.latency.bench_with_replay import bench_with_replay
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated, load_requests
from mmcompress.runtime.bundle import hash_bundle_models
from mmcompress.runtime.machine import describe_cpu, fingerprint_device, list_package_versions
from mmcompress.runtime.progress import StageProgress, ignore_progress, scale_progress

TABLE_START = 0.1
"""Share of the work that is done, about, when the device table begins."""

EXPORTS_START = 0.7
"""Share of the work that is done, about, when the exports begin: the table takes longest."""


def measure_kit(
    folder: Path, progress: StageProgress = ignore_progress, *, bench: Benchmarker | None = None
) -> Readings:
    """Measure a kit on this device: whole pipelines, the device table, every export.

    Args:
        folder: The kit.
        progress: Receives what is measured.
        bench: Measures latency; by default this device.

    Returns:
        The readings.

    Raises:
        DataError: The folder is no kit, or a file of it can't be read.
        BundleError: A bundle of the kit is damaged.
    """
    kit = open_kit(folder)
    bench = bench or Benchmarker()
    progress("the dense pipeline", 0.0)
    requests = load_requests(folder, kit.texts)
    options = BenchmarkOptions(
        warmup=kit.warmup,
        max_requests=kit.requests,
        threads=kit.threads,
        batch=kit.batch,
        loads=1,
    )
    samples = bench_repeated(
        {"dense": folder / BASELINE_FOLDER},
        requests,
        options=options,
        benchmark=bench.benchmark_bundles,
    )
    dense_latency = samples["dense"].summarize()
    reference_samples = bench_with_replay(
        list_reference_bundles(folder, kit.plan.reference_names),
        requests,
        options=replace(options, traces=dense_latency.traces),
        dense_ms=dense_latency.latency.p50,
        benchmark=bench.benchmark_bundles,
    )
    table = _measure_table(kit, progress, bench=bench)
    export_ms = _time_exports(kit, folder, progress=progress, bench=bench)
    return Readings(
        device=fingerprint_device(kit.threads, kit.provider),
        cpu=describe_cpu(),
        versions=list_package_versions(),
        threads=kit.threads,
        provider=kit.provider,
        batch=kit.batch,
        pipeline=kit.pipeline,
        dense_identity=hash_bundle_models(folder / BASELINE_FOLDER),
        plan=kit.plan,
        exports=kit.exports,
        export_ms=tuple(export_ms),
        node_ratios=compute_node_ratios(reference_samples),
        baseline=PipelineMeasurement.from_latency(dense_latency),
        table=table,
    )


def _measure_table(kit: Kit, progress: StageProgress, *, bench: Benchmarker) -> DeviceTable:
    """Return the device table with a row for every block of the kit."""
    return bench.complete_device_table(
        list_table_needs(kit.plan.deployed, kit.plan.windows),
        kit.threads,
        precisions=kit.plan.every_precision,
        progress=scale_progress(progress, start=TABLE_START, end=EXPORTS_START),
        provider=kit.provider,
    )


def _time_exports(
    kit: Kit, folder: Path, *, progress: StageProgress, bench: Benchmarker
) -> list[float]:
    """Return the milliseconds per request in the sessions of every export."""
    export_ms: list[float] = []
    for i, export in enumerate(kit.exports):
        share = EXPORTS_START + (1 - EXPORTS_START) * i / len(kit.exports)
        progress(f"whole export of {export.node}, {export.precision}", share)
        milliseconds = bench.time_export(export, folder, threads=kit.threads, provider=kit.provider)
        export_ms.append(milliseconds)
    return export_ms
