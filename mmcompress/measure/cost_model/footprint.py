"""What a structure weighs: parameters from its blocks, size and memory calibrated on whole exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import LinearFit
from mmcompress.measure.latency.memory import MB, measure_memory_mb


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Parameters, size and memory of any structure of one pipeline.

    `params`: of the dense nodes; `unit`: parameters that go with each unit of a block; `size`: megabytes of a node
    against its parameters in millions, by precision; `rest_mb`: files that are no models; `empty_mb`: the memory of the
    bare runtime, `per_mb`: what a megabyte of bundle takes beside it.
    """

    dense_params: dict[str, int]
    params_per_unit: dict[str, dict[str, float]]
    size_fits: dict[str, dict[str, LinearFit]]
    rest_mb: float = 0.0
    empty_mb: float = 0.0
    per_mb: float = 1.0
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    fp32_blocks: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """Blocks that stay in fp32, by node and precision."""

    def node_params(self, node: str, candidate: Candidate) -> float:
        kept = candidate.kept_units.get(node, {})
        return self.dense_params[node] - sum(
            each * (self.units[node][b] - kept.get(b, self.units[node][b]))
            for b, each in self.params_per_unit[node].items()
        )

    def total_params(self, candidate: Candidate) -> float:
        return sum(self.node_params(n, candidate) for n in self.dense_params)

    def size_mb(self, candidate: Candidate) -> float:
        total = self.rest_mb
        for n in self.dense_params:
            a = self.size_fits[n][candidate.precision[n]]
            total += a.base + a.scale * self.node_params(n, candidate) / 1e6
            whole = self.size_fits[n].get("fp32", a).scale - a.scale
            for b in self.fp32_blocks.get(n, {}).get(candidate.precision[n], ()):
                total += (
                    whole
                    * self.params_per_unit[n][b]
                    * candidate.kept_units.get(n, {}).get(b, self.units[n][b])
                    / 1e6
                )
        return total

    def memory_mb(self, candidate: Candidate) -> float:
        return self.empty_mb + self.per_mb * self.size_mb(candidate)


def count_params_per_unit(model: Any, block: Block) -> float:
    """Parameters that go with one unit of a block: rows of its writers, columns of its readers, all it passes."""
    if block.group == "tokens":
        return 0.0
    total = 0.0
    for w in block.writers:
        module = model.get_submodule(w.path)
        row = module.weight[0].numel() + (module.bias is not None)
        total += w.parts * w.width * row
    for path in block.per_channel:
        total += block.width * sum(p[0].numel() for p in model.get_submodule(path).parameters())
    for path in (block.reader, *block.extra_readers):
        total += block.width * model.get_submodule(path).weight[:, 0].numel()
    return total


def measure_footprint(
    models: Mapping[str, Any],
    size: dict[str, dict[str, LinearFit]],
    params: Mapping[str, int],
    bundle: Path,
    *,
    memory: Callable[[Path | None], float] = measure_memory_mb,
) -> Footprint:
    """The footprint of a pipeline from its models, calibrated sizes, and its dense bundle."""
    whole = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) / MB
    in_nodes = sum(f.stat().st_size for n in models for f in (bundle / n).glob("*.onnx")) / MB
    empty = memory(None)
    return Footprint(
        dense_params=dict(params),
        params_per_unit={
            n: {b.name: count_params_per_unit(m, b) for b in m.blocks} for n, m in models.items()
        },
        size_fits=size,
        rest_mb=whole - in_nodes,
        empty_mb=empty,
        per_mb=max(memory(bundle) - empty, 0.0) / whole,
        units={n: {b.name: b.units for b in m.blocks} for n, m in models.items()},
    )
