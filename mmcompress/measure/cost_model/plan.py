"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcompress.measure.cost_model.predictor import DeployedBlock, PositionWindow

QUANTIZED_FOLDER = "rounded"
"""The folder of pipelines that the dense one is measured beside: in other precisions, and smaller ones."""


@dataclass(frozen=True)
class GraphCall:
    """One graph of an export: its file, the inputs it gets in deployment (.npz), and its calls per request."""

    file: str
    feed: str
    calls: float


@dataclass(frozen=True, kw_only=True)
class Export:
    """A node exported whole. `kept`: its units; `cut`: positions gone; `graphs`: what a request runs."""

    node: str
    precision: str
    kept_units: dict[str, int]
    cut_positions: int
    params_m: float
    size_mb: float
    graphs: dict[str, GraphCall]


@dataclass(frozen=True, kw_only=True)
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
            name_small_pipeline(name, p)
            for name in self.small_structures
            for p in self.every_precision
        )

    @property
    def every_precision(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p for by in self.precisions.values() for p in by))

    def describe_blocks(self) -> dict[str, list[tuple[Any, ...]]]:
        """Name, units, kind, widths and batch of every block by node, and its positions where those do not depend on
        how much a generator writes."""
        shape = lambda p: (*p.key[:3], p.key[5], p.key[3] if p.calls == 1 and not p.window else 0)
        return {n: [(p.name, p.units, *shape(p)) for p in row] for n, row in self.deployed.items()}


def name_small_pipeline(name: str, precision: str) -> str:
    """The folder of a smaller pipeline in a precision."""
    return f"{name}-{precision}"


def list_reference_bundles(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The dense bundle and those measured beside it, by name."""
    return {"fp32": folder / "baseline", **{n: folder / QUANTIZED_FOLDER / n for n in names}}
