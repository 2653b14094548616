"""What passes between stages: frozen dataclasses that survive a JSON round trip, and the one builder that makes them.

`build` is also what turns a YAML spec into its records, so there is one schema of every option: its dataclass.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mmcompress.errors import DataError
from mmcompress.registry import Registry, suggest_nearest

T = TypeVar("T")
KeptUnits = dict[str, int]
"""Units kept per block of one node."""


class InvalidValue(Exception):
    """A value that does not fit its type. `path` leads to it from the root."""

    def __init__(self, path: tuple[str, ...], message: str):
        super().__init__(f"{'.'.join(path)}: {message}")
        self.path, self.message = path, message

    def __reduce__(self) -> tuple:  # crosses process borders
        return type(self), (self.path, self.message)


def build_record(cls: type[T], data: Any, path: tuple[str, ...] = ()) -> T:
    """Make a dataclass from plain data, checking names and types on the way. Raises `Invalid`."""
    if not isinstance(data, dict):
        raise InvalidValue(path, f"expected a mapping, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise InvalidValue((*path, str(key)), f"unknown key '{key}'; {suggest_nearest(key, fields)}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], (*path, name))
            registry: Registry | None = f.metadata.get("registry")
            if registry and isinstance(values[name], str) and (problem := registry.problem(values[name])):
                raise InvalidValue((*path, name), problem)
            check = f.metadata.get("check")
            if check and values[name] is not None and (problem := check(values[name])):
                raise InvalidValue((*path, name), f"{problem}, got {values[name]!r}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InvalidValue(path, f"'{name}' is missing")
    return cls(**values)


def _value(hint: Any, value: Any, path: tuple[str, ...]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _value(option, value, path)
            except InvalidValue:
                continue
        return _value(options[-1], value, path)
    if origin is typing.Literal:
        if value not in args:
            raise InvalidValue(path, f"unknown value '{value}'; {suggest_nearest(value, args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InvalidValue(path, f"expected a list, got {value!r}")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise InvalidValue(path, f"expected {len(args)} values, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_value(k, v, (*path, str(i))) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is list:
        if not isinstance(value, list):
            raise InvalidValue(path, f"expected a list, got {value!r}")
        return [_value(args[0], v, (*path, str(i))) for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise InvalidValue(path, f"expected a mapping, got {value!r}")
        return {str(k): _value(args[1], v, (*path, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build_record(hint, value, path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InvalidValue(path, f"expected {hint.__name__}, got {value!r}")
    return value


def to_plain(obj: Any) -> Any:
    """A record as JSON-ready data."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_plain(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}
    if isinstance(obj, dict):
        return {str(k): to_plain(v) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_plain(v) for v in obj]
    return obj


def write_record(path: Path, obj: Any, indent: int | None = 1) -> Path:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(to_plain(obj), indent=indent) + "\n")
    new.replace(path)
    return path


def read_record(cls: type[T], path: Path) -> T:
    """A record written before. Raises `DataError` when the file is missing, damaged or of another version."""
    try:
        return build_record(cls, json.loads(path.read_text()))
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: can't be read: {e}") from e
    except InvalidValue as e:
        raise DataError(f"{path}: damaged, or written by another version: {e}") from e


@dataclass(frozen=True)
class Writer:
    """A linear layer or convolution that writes `width` rows for each unit, `parts` times over (a fused q, k, v: 3)."""

    path: str
    parts: int
    width: int


@dataclass(frozen=True)
class Block:
    """A prunable sub-layer: `units` units of `width` features each, read by the linear layer `out`.

    Every unit kind fits this form: a unit's features are columns of `out`, and rows of the `writers` bring them about
    (a group of query heads has more of them than the key head it shares). `step` is the granularity of a cut, `reads`
    the streams whose values meet in the block, `drop` the modules replaced by a constant when no unit is left: (path,
    mode); where it is empty, the block can't be removed whole. Between writers and `out`, features may pass `through`
    modules that treat each alone (batch norms, depthwise convolutions) and be read by others `also` (a squeeze).

    Positions of a sequence are units too (`kind` tokens): `out` is the `models.base.Tokens` that passes on those kept.
    """

    name: str
    kind: str
    reader: str
    writers: tuple[Writer, ...]
    units: int
    width: int
    granularity: int
    module: str
    reads: tuple[str, ...]
    drop: tuple[tuple[str, str], ...]
    per_channel: tuple[str, ...] = ()
    extra_readers: tuple[str, ...] = ()
    prefix_only: bool = False
    """Units go from the end alone (the window of an audio encoder)."""

    @property
    def rows_and_columns_per_unit(self) -> int:
        """What a unit counts where shares of several blocks are added up: its rows of writers and columns of `out`."""
        return self.width + sum(w.parts * w.width for w in self.writers)

    @property
    def min_units(self) -> int:
        """The fewest units that may be left."""
        return 0 if self.drop else min(self.granularity, self.units)

    @property
    def group(self) -> str:
        """`heads`, `ffn` (channels, of convolutions too) or `tokens`: what a pruning ratio in the spec speaks of."""
        if self.kind == "tokens":
            return "tokens"
        return "ffn" if self.kind.endswith("ffn") or self.kind == "conv" else "heads"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of `n` samples."""

    p50: float
    p95: float
    n: int
    iqr: float = 0.0
    """Interquartile range."""


@dataclass(frozen=True)
class Quality:
    """A metric with its 95 % interval over `n` samples."""

    value: float
    low: float
    high: float
    n: int
    is_error_rate: bool = False
    """An error rate: lower is better."""


@dataclass(frozen=True)
class Proof:
    """One check of an artifact: the largest difference seen, and the bound it had to stay under."""

    name: str
    node: str
    difference: float
    bound: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Candidate:
    """A structure and the precision of each node: all that a trial decides."""

    kept_units: dict[str, KeptUnits]
    precision: dict[str, str]

    def key(self) -> str:
        return json.dumps(to_plain(self), sort_keys=True)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Attempt:
    """A structure that was exported and measured before anything was trained."""

    predicted_ms: float
    measured_ms: float
    target_ms: float
    margin: float = 0.0
    """What the measurement may be off by."""
    node_ratios: dict[str, float] = field(default_factory=dict)
    """p50 of each node over that of the dense one beside it."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class SearchResult:
    trials: int
    feasible: int
    failed: int
    seconds: float
    workers: dict[str, int] = field(default_factory=dict)
    split_losses: tuple[float, ...] = ()
    """Least loss of a split of the budget, round by round: damage was measured anew in between. `judged`: for it."""
    linearization_evaluations: int = 0


@dataclass(frozen=True)
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
