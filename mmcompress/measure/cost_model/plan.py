"""What has to be measured of a device to predict a pipeline on it. Records only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmcompress.graph.structure import KeptUnits
from mmcompress.measure.cost_model.predictor import DeployedBlock, PositionWindow

DENSE_NAME = "fp32"
"""Precision of the dense pipeline, and its name among pipelines that are measured in turn."""

BASELINE_FOLDER = "baseline"
"""Folder of the dense bundle in a run's shared folder, and in a kit."""

QUANTIZED_FOLDER = "rounded"
"""Folder of the pipelines that the dense one is measured in turn with: other precisions, and
smaller structures."""


@dataclass(frozen=True, kw_only=True)
class GraphCall:
    """One graph of an export."""

    file: str
    """ONNX file, relative to the folder of all exports."""
    feed: str
    """Inputs as they come in deployment (.npz), relative to the same folder."""
    calls: float
    """Calls per request."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A node exported whole, at one structure and in one precision."""

    node: str
    """The node that was exported."""
    precision: str
    """Its precision, by the name that a spec uses."""
    kept_units: KeptUnits
    """Units kept in every block."""
    cut_positions: int
    """Positions that the structure leaves out."""
    params_m: float
    """Parameters in millions."""
    size_mb: float
    """Megabytes of its graphs."""
    graphs: dict[str, GraphCall]
    """What a request runs, by the name of the graph."""


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What must agree between two plans for the readings of one to serve the other.

    Key positions are left out: they depend on how much a generator writes.
    """

    name: str
    """Name of the block in its model."""
    units: int
    """Units of the whole block."""
    kind: str
    """Kind of block: `attention`, `ffn` and others."""
    width: int
    """Features of the residual stream around the block."""
    head: int
    """Features of one unit."""
    batch: int
    """Sequences in one call."""
    positions: int
    """Positions of a call; 0 where they depend on how much a generator writes, or can be cut."""


@dataclass(frozen=True, kw_only=True)
class MeasurementPlan:
    """Blocks with their shapes, positions that can be cut, and precisions, by node."""

    deployed: dict[str, tuple[DeployedBlock, ...]]
    """Every prunable block at the shape that it runs at."""
    windows: dict[str, PositionWindow]
    """Positions that can be cut; nodes without any are missing."""
    precisions: dict[str, tuple[str, ...]]
    """Precisions that the search may choose, fp32 first."""
    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Nodes that each node waits for. Empty where all nodes run one after the other."""
    small_structures: dict[str, dict[str, KeptUnits]] = field(default_factory=dict)
    """Kept units of smaller pipelines, by name and node: a share of all blocks, and some blocks
    left out."""

    @property
    def every_precision(self) -> tuple[str, ...]:
        """Precisions of any node, each once."""
        precisions: dict[str, None] = {}
        for node_precisions in self.precisions.values():
            precisions.update(dict.fromkeys(node_precisions))
        return tuple(precisions)

    @property
    def reference_names(self) -> tuple[str, ...]:
        """Folders of the pipelines that are measured in turn with the dense one."""
        names = [precision for precision in self.every_precision if precision != DENSE_NAME]
        for small_structure in self.small_structures:
            for precision in self.every_precision:
                names.append(name_small_pipeline(small_structure, precision))
        return tuple(names)

    def describe_blocks(self) -> dict[str, list[BlockFacts]]:
        """Describe every block, by node, by what must agree between two plans."""
        facts_by_node: dict[str, list[BlockFacts]] = {}
        for node, blocks in self.deployed.items():
            facts_by_node[node] = [_describe_block(block) for block in blocks]
        return facts_by_node


def _describe_block(block: DeployedBlock) -> BlockFacts:
    """Describe a block by what must agree between two plans."""
    has_fixed_positions = block.calls == 1 and not block.window
    return BlockFacts(
        name=block.name,
        units=block.units,
        kind=block.key.kind,
        width=block.key.width,
        head=block.key.head,
        batch=block.key.batch,
        positions=block.key.positions if has_fixed_positions else 0,
    )


def name_small_pipeline(small_structure: str, precision: str) -> str:
    """Name the folder of a smaller pipeline in a precision."""
    return f"{small_structure}-{precision}"


def list_reference_bundles(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """List the dense bundle and those that are measured in turn with it.

    Args:
        folder: The folder of a kit, or the shared folder of a run.
        names: `MeasurementPlan.reference_names`.

    Returns:
        Folders of bundles by name; the dense one is `DENSE_NAME`.
    """
    bundles = {DENSE_NAME: folder / BASELINE_FOLDER}
    for name in names:
        bundles[name] = folder / QUANTIZED_FOLDER / name
    return bundles
