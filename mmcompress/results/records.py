"""What passes between stages: frozen dataclasses that survive a JSON round trip, and the one builder that makes them.

`build` is also what turns a YAML spec into its records, so there is one schema of every option: its dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.stats import Latency, Quality


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One check of an artifact: the largest difference seen, and the bound it had to stay under."""

    name: str
    node: str
    difference: float
    bound: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluated candidate. `loss` is the pipeline's own loss on the choosing split: lower is better."""

    number: int
    origin: str
    overrides: dict[str, Any]
    candidate: Candidate
    latency_ms: float
    loss: float
    quality: dict[str, float]
    evaluation_seconds: float
    worker: str = ""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Random structures of a pipeline, predicted and measured whole; milliseconds of a request each."""

    pipeline: str
    mean_absolute_error: float
    spearman: float
    predicted_ms: tuple[float, ...]
    measured_ms: tuple[float, ...]
    cpu: dict[str, Any]
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A structure that was exported and measured before anything was trained."""

    predicted_ms: float
    measured_ms: float
    target_ms: float
    margin: float = 0.0
    """What the measurement may be off by."""
    node_ratios: dict[str, float] = field(default_factory=dict)
    """p50 of each node over that of the dense one beside it."""


@dataclass(frozen=True, kw_only=True)
class NodeResult:
    """One model of the pipeline as deployed."""

    latency_ms_p50: float
    params: int
    macs: int
    size_mb: float
    precision: str
    unimodal_ratio: float | None
    cross_modal_ratio: float | None
    sparsity: float = 0.0
    """Share of zeros among the weights of its blocks."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of the comparison: the dense baseline, or what was made of it."""

    latency_ms: Latency
    quality: dict[str, Quality]
    size_mb: float
    params: int
    nodes: dict[str, NodeResult]
    model_share: float
    """Share of the end-to-end time spent inside model sessions."""
    memory_mb: float = 0.0
    """Peak resident memory of a process that loads the bundle and answers once."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What was asked; `floor_ms`: the lowest latency predicted of anything in the search space, `fixed_ms`: the part of
    it that no prunable block accounts for, `fixed` what the nodes have of that; `lowest`: the least predicted of what
    has a limit (nodes in ms, parameters in M, size and memory in MB); `unmet`: every bound that the result exceeds."""

    latency_ms: float
    speedup: float
    met: bool
    asked: str = ""
    statistic: str = "p50"
    floor_ms: float = 0.0
    fixed_ms: float = 0.0
    latency_ms_p50: float | None = None
    """The same as `latency_ms` where the target is a median."""
    exceeded_bounds: tuple[str, ...] = ()
    fixed_ms_by_node: dict[str, float] = field(default_factory=dict)
    lowest_reachable: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    trials: int
    feasible: int
    failed: int
    seconds: float
    workers: dict[str, int] = field(default_factory=dict)
    split_losses: tuple[float, ...] = ()
    """Least loss of a split of the budget, round by round: damage was measured anew in between. `judged`: for it."""
    linearization_evaluations: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`summary.json`: everything the report shows."""

    pipeline: str
    target: Target
    baseline: Side
    compressed: Side
    speedup: float
    quality_retained: float
    predicted_latency_ms_p50: float
    unimodal_ratio: float
    cross_modal_ratio: float | None
    kept_units: dict[str, KeptUnits]
    blocks: dict[str, tuple[Block, ...]]
    cross_modal_reasons: dict[str, dict[str, str]]
    proofs: tuple[Proof, ...]
    search: SearchResult
    trials: tuple[Trial, ...]
    warnings: tuple[str, ...]
    timings: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]
    cpu: dict[str, Any]
    seed: int
    commit: str
    command: str
    device: str = ""
    """Fingerprint of the device that the latencies are of; those of no samples (n = 0) are predicted, not measured."""
    peak_memory_mb: float = 0.0
    """Peak resident memory of the process that drove the run; workers come on top."""
    validation_losses: tuple[float, ...] = ()
    """The pipeline's own loss on choosing pairs: dense, before training, on the way through it, and at the end."""
    samples: tuple[dict[str, str], ...] = ()
    extra_splits: dict[str, dict[str, dict[str, Quality]]] = field(default_factory=dict)
    """Further splits, reported apart: split -> side -> metric."""
    attempts: tuple[Attempt, ...] = ()
    """Structures measured whole on the way to this one, in order."""
    bench_repeats: int = 0
    """In how many parts the latency of both sides was measured."""
    machine_speed_factor: float = 1.0
    """The factor from what the result took of the dense pipeline to what it takes on this machine usually, as whole
    pipelines of its precisions show, measured now and all through the run; 1 where none was."""
    aimed_share: float = 1.0
    """The share of the target that its structure was chosen for."""
