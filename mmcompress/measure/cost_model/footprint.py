"""Estimate parameters, size and memory of a structure.

Parameters follow from its blocks; size and memory are fitted to whole exports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate, Fp32Blocks, find_fp32_blocks
from mmcompress.measure.cost_model.predictor import LinearFit
from mmcompress.measure.latency.memory import measure_memory_mb
from mmcompress.runtime.environment import BYTES_PER_MB


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Estimates parameters, size and memory of any structure of one pipeline."""

    dense_params: dict[str, int]
    """Parameters of the whole nodes."""
    params_per_unit: dict[str, dict[str, float]]
    """Parameters that go with one unit, by node and block."""
    size_fits: dict[str, dict[str, LinearFit]]
    """Megabytes of a node against its parameters in millions, by node and precision."""
    rest_mb: float = 0.0
    """Megabytes of a bundle's files that are no models."""
    empty_mb: float = 0.0
    """Megabytes of memory of the bare runtime."""
    per_mb: float = 1.0
    """Megabytes of memory per megabyte of bundle, besides the bare runtime."""
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    """Units of the whole blocks, by node and block."""
    fp32_blocks: Fp32Blocks = field(default_factory=dict)
    """Blocks that stay in fp32, by node and precision."""

    def count_node_params(self, node: str, candidate: Candidate) -> float:
        """Return the parameters of one node."""
        removed_params = 0.0
        for block, params in self.params_per_unit[node].items():
            whole_units = self.units[node][block]
            removed_params += params * (
                whole_units - self._count_units_left(node, block, candidate=candidate)
            )
        return self.dense_params[node] - removed_params

    def count_params(self, candidate: Candidate) -> float:
        """Return the parameters of all nodes."""
        return sum(self.count_node_params(node, candidate) for node in self.dense_params)

    def predict_size_mb(self, candidate: Candidate) -> float:
        """Return the megabytes of a bundle."""
        total_mb = self.rest_mb
        for node in self.dense_params:
            precision = candidate.precision[node]
            fit = self.size_fits[node][precision]
            total_mb += fit.base + fit.scale * self.count_node_params(node, candidate) / 1e6
            # the fit holds for a node that is all in its precision: blocks in fp32 are larger
            fp32_fit = self.size_fits[node].get("fp32", fit)
            extra_mb_per_m = fp32_fit.scale - fit.scale
            for block in find_fp32_blocks(self.fp32_blocks, node, precision=precision):
                unit_params = self.params_per_unit[node][block]
                left_units = self._count_units_left(node, block, candidate=candidate)
                total_mb += extra_mb_per_m * unit_params * left_units / 1e6
        return total_mb

    def predict_memory_mb(self, candidate: Candidate) -> float:
        """Return the peak megabytes of memory of a process that runs a bundle."""
        return self.empty_mb + self.per_mb * self.predict_size_mb(candidate)

    def _count_units_left(self, node: str, block: str, *, candidate: Candidate) -> int:
        """Return the units of a block that a candidate keeps."""
        return candidate.kept_units.get(node, {}).get(block, self.units[node][block])


def measure_footprint(
    blocks: Mapping[str, Sequence[Block]],
    size_fits: Mapping[str, Mapping[str, LinearFit]],
    *,
    dense_params: Mapping[str, int],
    params_per_unit: Mapping[str, Mapping[str, float]],
    bundle: Path,
    measure_memory: Callable[[Path | None], float] = measure_memory_mb,
) -> Footprint:
    """Measure what a footprint needs of a pipeline.

    Args:
        blocks: The whole blocks, by node.
        size_fits: Megabytes against millions of parameters, by node and precision.
        dense_params: Parameters of the whole nodes.
        params_per_unit: Parameters that go with one unit, by node and block.
        bundle: The dense bundle.
        measure_memory: Returns the peak megabytes of a process that runs a bundle, or just the
            runtime for None.

    Returns:
        The footprint.
    """
    bundle_mb = (
        sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()) / BYTES_PER_MB
    )
    model_bytes = 0
    for node in blocks:
        model_bytes += sum(file.stat().st_size for file in (bundle / node).glob("*.onnx"))
    empty_mb = measure_memory(None)
    bundle_memory_mb = max(measure_memory(bundle) - empty_mb, 0.0)
    units: dict[str, dict[str, int]] = {}
    for node, node_blocks in blocks.items():
        units[node] = {block.name: block.units for block in node_blocks}
    copied_params = {node: dict(params) for node, params in params_per_unit.items()}
    copied_fits = {node: dict(fits) for node, fits in size_fits.items()}
    return Footprint(
        dense_params=dict(dense_params),
        params_per_unit=copied_params,
        size_fits=copied_fits,
        rest_mb=bundle_mb - model_bytes / BYTES_PER_MB,
        empty_mb=empty_mb,
        per_mb=bundle_memory_mb / bundle_mb,
        units=units,
    )
