"""Checks a compressed bundle on the device that it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.cost_model.plan import BASELINE_FOLDER
from mmcompress.measure.devices.kit import open_kit
from mmcompress.measure.latency.bench import (
    COMPARISON_SECONDS,
    MAX_REQUESTS_FACTOR,
    BenchmarkOptions,
)
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated, load_requests
from mmcompress.runtime.bundle import hash_bundle_models
from mmcompress.runtime.machine import describe_cpu, fingerprint_device, list_package_versions

CHECK_SECONDS = 2 * COMPARISON_SECONDS
"""Seconds that the two bundles are compared for: twice as long as in a search, for this is the last
word on the bundle."""


@dataclass(frozen=True, kw_only=True)
class BundleCheck:
    """Two bundles measured on a device in turn; the JSON that `device check` writes."""

    device: str
    """Fingerprint of the device: processor, threads and version of ONNX Runtime."""
    cpu: dict[str, Any]
    """The processor, as `describe_cpu` gives it."""
    versions: dict[str, str]
    """Versions of the packages on the device, by name."""
    threads: int
    """Threads that both were measured with."""
    dense: str
    """Hash of the models of the dense bundle."""
    bundle: str
    """Hash of the models of the compressed bundle."""
    baseline: PipelineMeasurement
    """The dense bundle, end to end."""
    compressed: PipelineMeasurement
    """The compressed bundle, end to end."""


def check_bundle(folder: Path, bundle: Path) -> BundleCheck:
    """Measure a bundle beside the dense one of a kit on this device, the same requests in turn.

    It is measured as a run measures its own result: every generator writes freely.

    Args:
        folder: The kit.
        bundle: The compressed bundle.

    Returns:
        The figures of both.

    Raises:
        DataError: The folder is no kit, or a file of it can't be read.
        BundleError: A bundle is damaged.
    """
    kit = open_kit(folder)
    baseline = folder / BASELINE_FOLDER
    options = BenchmarkOptions(
        warmup=kit.warmup,
        max_requests=MAX_REQUESTS_FACTOR * kit.requests,
        min_requests=kit.requests,
        seconds=CHECK_SECONDS,
        threads=kit.threads,
        batch=kit.batch,
    )
    bundles = {"dense": baseline, "compressed": bundle}
    samples = bench_repeated(bundles, load_requests(folder, kit.texts), options=options)
    return BundleCheck(
        device=fingerprint_device(kit.threads, kit.provider),
        cpu=describe_cpu(),
        versions=list_package_versions(),
        threads=kit.threads,
        dense=hash_bundle_models(baseline),
        bundle=hash_bundle_models(bundle),
        baseline=PipelineMeasurement.from_latency(samples["dense"].summarize()),
        compressed=PipelineMeasurement.from_latency(samples["compressed"].summarize()),
    )
