"""End-to-end latency of a candidate from the device table, calibrated on whole exports. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.measure.cost_model.device_table import (
    DeviceTable,
    TableKey,
    TableRow,
    interpolate_ms,
)
from mmcompress.runtime.graph import sum_critical_path

Rows = Mapping[tuple, TableRow]


Cuts = Mapping[str, int]


NO_CUTS: Cuts = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class DeployedBlock:
    """A block as deployed: its table key and how often it runs per request."""

    name: str
    units: int
    granularity: int
    key: TableKey
    calls: float
    context: TableKey | None = None
    """What runs once a request beside the loop: K and V of a cross-attention, or the block over a prefix."""
    window: str = ""
    """The node whose positions pass through it, or are its keys: with each one cut there it is one shorter."""

    def shortened_keys(self, cut: int) -> tuple[TableKey, TableKey | None]:
        """Its keys in the table when `cut` positions are gone."""
        kind, width, head, positions, keys, batch = self.key
        alone = self.context is None
        key = (
            kind,
            width,
            head,
            positions - cut if alone else positions,
            keys - cut if keys > 1 else keys,
            batch,
        )
        if self.context is None:
            return key, None
        kind, width, head, positions, keys, batch = self.context
        return key, (kind, width, head, positions - cut, keys - cut, batch)


@dataclass(frozen=True, kw_only=True)
class PositionWindow:
    """Positions of a node that can be cut: how many there are, and the numbers of cut ones the table is measured at."""

    count: int
    ordered: bool
    cuts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """Measured node latency = base + scale * sum over blocks of the table + each * blocks that are not gone."""

    base: float
    scale: float
    per_block_ms: float = 0.0

    def scaled(self, factor: float) -> LinearFit:
        return LinearFit(
            base=self.base * factor,
            scale=self.scale * factor,
            per_block_ms=self.per_block_ms * factor,
        )

    @classmethod
    def fit_in_pipeline(
        cls, sums: Sequence[float], blocks: Sequence[int], *, measured: Sequence[float]
    ) -> LinearFit | None:
        """Least squares in relative error of all three terms, none negative, exact for the first; None: impossible."""
        y = np.asarray(measured)
        a = np.stack([1 / y, np.asarray(sums) / y, np.asarray(blocks) / y], 1)
        found: list[tuple[float, np.ndarray]] = []
        for some in ([0, 1, 2], [0, 1], [1, 2], [1]):
            x = np.zeros(3)
            x[some] = np.linalg.lstsq(a[:, some], np.ones(len(y)), rcond=None)[0]
            if (x >= 0).all() and x[1] > 0:
                found.append((float(np.square(a @ x - 1).sum()), x))
        if not found:
            return None
        x = min(found, key=lambda f: f[0])[1]
        base, scale, per_block_ms = (x / (a[0] @ x)).tolist()
        return cls(base=base, scale=scale, per_block_ms=per_block_ms)

    @classmethod
    def fit(
        cls, predicted: Sequence[float], measured: Sequence[float], *, left: Sequence[float] = ()
    ) -> LinearFit:
        """Least squares in relative error, no term negative. `left`: the share of the base that is there."""
        x, y = np.asarray(predicted), np.asarray(measured)
        there = np.asarray(left) if len(left) else np.ones(len(x))
        if len(x) == 1 or np.ptp(x) < 1e-6:
            scale = float(np.mean(y / x)) if len(x) else 1.0
            return cls(base=0.0, scale=scale)
        a = np.stack([there / y, x / y], 1)
        (base, scale), *_ = np.linalg.lstsq(a, np.ones(len(x)), rcond=None)
        if scale <= 0:
            return cls(base=float(np.mean(y / there)), scale=0.0)
        if base < 0:
            return cls(base=0.0, scale=float(1 / np.mean(x / y)))
        return cls(base=float(base), scale=float(scale))


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Latency of a pipeline whose nodes run one after the other on the same cores, or along its critical path.

    `affine[node][precision]` calibrates the sessions of a node, `around[node]` is what it spends beside them (the
    preparation of inputs, the decode loop), `overhead_ms` what is spent beside all nodes; `correction`: the residual
    fed back after a measured miss; `tail`: what is predicted of a request over its p50, where the target is a p95;
    `reads`: the nodes that each waits for where branches run in parallel.
    """

    table: DeviceTable
    deployed: dict[str, tuple[DeployedBlock, ...]]
    fits: dict[str, dict[str, LinearFit]]
    overhead_ms: float
    correction: float = 1.0
    windows: dict[str, PositionWindow] = field(default_factory=dict)
    size_fits: dict[str, dict[str, LinearFit]] = field(default_factory=dict)
    """Megabytes of a node against its parameters in millions, by precision."""
    fp32_blocks: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """Blocks that stay in fp32, by node and precision."""
    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outside_sessions_ms: dict[str, float] = field(default_factory=dict)
    p95_ratio: float = 1.0

    @property
    def factor(self) -> float:
        """From what nodes add up to, to what is predicted of a request."""
        return self.correction * self.p95_ratio

    def critical_path_ms(self, ms: Mapping[str, float]) -> float:
        """What nodes of so many milliseconds take together."""
        return sum_critical_path(ms, self.reads) if self.reads else sum(ms.values())

    def choose_block_precision(self, node: str, block: str, *, precision: str) -> str:
        """The precision a block of a node is really in."""
        return "fp32" if block in self.fp32_blocks.get(node, {}).get(precision, ()) else precision

    def table_ms(
        self, node: str, kept: KeptUnits, *, precision: str, rows: Rows, cuts: Cuts = NO_CUTS
    ) -> float:
        """Sum of the table over the blocks of a node, in milliseconds per request."""
        of = lambda p: self.choose_block_precision(node, p.name, precision=precision)
        return sum(
            self.block_table_ms(
                rows, p, units=kept.get(p.name, p.units), precision=of(p), cuts=cuts
            )
            for p in self.deployed[node]
        )

    def block_table_ms(
        self, rows: Rows, p: DeployedBlock, *, units: int, precision: str, cuts: Cuts = NO_CUTS
    ) -> float:
        """Milliseconds of one block per request, linear between the measured windows."""

        def at(cut: int) -> float:
            key, context = p.shortened_keys(cut) if cut else (p.key, p.context)
            return p.calls * interpolate_ms(rows, key, units=units, precision=precision) + (
                interpolate_ms(rows, context, units=units, precision=precision) if context else 0
            )

        cut = cuts.get(p.window, 0)
        if not cut:
            return at(0)
        known = self.windows[p.window].cuts
        high = next((c for c in known if c >= cut), known[-1])
        low = max((c for c in known if c < high), default=0)
        return at(low) + (at(high) - at(low)) * (cut - low) / (high - low)

    def node_table_ms(
        self, node: str, kept: KeptUnits, *, precision: str, rows: Rows, cuts: Cuts = NO_CUTS
    ) -> float:
        units = lambda p: kept.get(p.name, p.units)
        each = (
            self.block_ms(node, p, units=units(p), precision=precision, rows=rows, cuts=cuts)
            for p in self.deployed[node]
        )
        return self.base_ms(node, precision, cuts=cuts) + sum(each)

    def block_ms(
        self,
        node: str,
        p: DeployedBlock,
        *,
        units: int,
        precision: str,
        rows: Rows,
        cuts: Cuts = NO_CUTS,
    ) -> float:
        """Milliseconds of one block per request as it runs in its node."""
        a, of = (
            self.fits[node][precision],
            self.choose_block_precision(node, p.name, precision=precision),
        )
        return a.scale * self.block_table_ms(rows, p, units=units, precision=of, cuts=cuts) + (
            a.per_block_ms if units else 0.0
        )

    def fixed_ms(self, candidate: Candidate) -> float:
        """The part of the prediction that no block accounts for: around the models, and beside their blocks."""
        return self.factor * (self.critical_path_ms(self._bases(candidate)) + self.overhead_ms)

    def fixed_ms_by_node(self, candidate: Candidate) -> dict[str, float]:
        """What each node has of that."""
        return {n: self.factor * ms for n, ms in self._bases(candidate).items()}

    def _bases(self, candidate: Candidate) -> dict[str, float]:
        cuts = self.count_cut_positions(candidate.kept_units)
        return {n: self.base_ms(n, candidate.precision[n], cuts=cuts) for n in self.deployed}

    def node_ms(self, node: str, candidate: Candidate) -> float:
        """Predicted p50 of one node."""
        rows, cuts = self.table.index_rows(), self.count_cut_positions(candidate.kept_units)
        return self.correction * self.node_table_ms(
            node,
            candidate.kept_units[node],
            precision=candidate.precision[node],
            rows=rows,
            cuts=cuts,
        )

    def base_ms(self, node: str, precision: str, *, cuts: Cuts) -> float:
        """What a node takes beside its blocks."""
        inside = self.fits[node][precision].base * self.compute_remaining_share(
            node, cuts.get(node, 0)
        )
        return self.outside_sessions_ms.get(node, 0.0) + inside

    def compute_remaining_share(self, node: str, cut: int) -> float:
        """The share of a node's base that is left: where a window ends early, all before the blocks is shorter too."""
        w = self.windows.get(node)
        return 1 - cut / w.count if w and w.ordered else 1.0

    def count_cut_positions(self, kept: Mapping[str, KeptUnits]) -> dict[str, int]:
        """Positions that a structure leaves out, by node."""
        return {
            n: w.count - kept.get(n, {}).get("tokens", w.count) for n, w in self.windows.items()
        }

    def __call__(self, candidate: Candidate) -> float:
        """Predicted milliseconds of a request: the p50, or what `tail` makes of it."""
        rows, cuts = self.table.index_rows(), self.count_cut_positions(candidate.kept_units)
        parts = {
            n: self.node_table_ms(
                n, candidate.kept_units[n], precision=candidate.precision[n], rows=rows, cuts=cuts
            )
            for n in self.deployed
        }
        return self.factor * (self.critical_path_ms(parts) + self.overhead_ms)


def deploy_blocks(
    blocks: Sequence[Block], shapes: Mapping[str, object], *, own: str, context_of: str
) -> tuple[DeployedBlock, ...]:
    """Blocks with the shapes (`models.base.Shape`) they run at.

    `own`: the node itself where its positions can be cut, `context_of`: the node it reads where those can; else empty.
    """
    found = []
    for b in blocks:
        if b.group == "tokens":
            continue
        s = shapes[b.name]
        key = (b.kind, s.width, s.head or b.width, s.positions, s.keys, s.batch)  # type: ignore[attr-defined]
        context: TableKey | None = None
        if s.prefill:  # type: ignore[attr-defined]
            context = (b.kind, s.width, b.width, s.prefill, s.prefill, 1)  # type: ignore[attr-defined]
        elif b.kind == "cross_attention":
            context = ("context", s.width, b.width, s.keys, s.keys, 1)  # type: ignore[attr-defined]
        window = context_of if context else own
        found.append(
            DeployedBlock(
                name=b.name,
                units=b.units,
                granularity=b.granularity,
                key=key,
                calls=s.calls,  # type: ignore[attr-defined]
                context=context,
                window=window,
            )
        )
    return tuple(found)


def list_table_needs(
    placed: Mapping[str, Sequence[DeployedBlock]], windows: Mapping[str, PositionWindow]
) -> list[tuple[TableKey, int, int]]:
    """What the device table must hold: (key, units, step); fewer sizes of the shorter windows."""
    found = []
    for p in (p for row in placed.values() for p in row):
        for cut in (0, *(windows[p.window].cuts if p.window in windows else ())):
            step = max(p.granularity, -(-p.units // 4)) if cut else p.granularity
            found += [(key, p.units, step) for key in p.shortened_keys(cut) if key]
    return found
