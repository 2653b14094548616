"""The readings of a device: all figures of a kit that a search for that device needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmcompress.measure.cost_model.device_table import DeviceTable
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement, fit_predictor
from mmcompress.measure.cost_model.plan import Export, MeasurementPlan
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.runtime.providers import CPU_PROVIDER


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What a device measured of a kit; the JSON that `device measure` writes."""

    device: str
    """Fingerprint of the device: processor, threads and version of ONNX Runtime."""
    cpu: dict[str, Any]
    """The processor, as `describe_cpu` gives it."""
    versions: dict[str, str]
    """Versions of the packages on the device, by name."""
    threads: int
    """Threads that everything was measured with."""
    pipeline: str
    """Name of the pipeline."""
    provider: str = CPU_PROVIDER
    """What sessions ran on."""
    batch: int = 1
    """Requests that were answered together."""
    dense_identity: str
    """Hash of the models of the dense bundle."""
    plan: MeasurementPlan
    """What had to be measured; from the kit."""
    exports: tuple[Export, ...]
    """The exported nodes; from the kit."""
    export_ms: tuple[float, ...]
    """Milliseconds per request in the sessions of each of `exports`, in the same order."""
    node_ratios: dict[str, dict[str, float]]
    """Latency of a node in a quantized or smaller pipeline over that in the dense one, by pipeline
    and node."""
    baseline: PipelineMeasurement
    """The dense pipeline, end to end."""
    table: DeviceTable
    """Latencies of single blocks."""

    def fit_predictor(self) -> Predictor:
        """Return the latency predictor of the device."""
        return fit_predictor(
            self.plan,
            self.table,
            exports=self.exports,
            export_ms=self.export_ms,
            dense=self.baseline,
            node_ratios=self.node_ratios,
        )
