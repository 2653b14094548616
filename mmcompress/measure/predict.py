"""End-to-end latency of a candidate from the device table, calibrated on whole exports. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmcompress.measure.table import Key, Row, Table, cost
from mmcompress.records import Block, Candidate, Kept


@dataclass(frozen=True)
class Placed:
    """A block as deployed: its table key and how often it runs per request."""

    name: str
    units: int
    step: int
    key: Key
    calls: float
    context: Key | None = None
    """What runs once a request beside the loop: K and V of a cross-attention, or the block over a prefix."""


@dataclass(frozen=True)
class Affine:
    """Measured node latency = base + scale * sum over blocks of the table."""

    base: float
    scale: float

    @classmethod
    def fit(cls, predicted: Sequence[float], measured: Sequence[float]) -> Affine:
        """Least squares in relative error, both terms kept from going negative."""
        x, y = np.asarray(predicted), np.asarray(measured)
        if len(x) == 1 or np.ptp(x) < 1e-6:
            return cls(0.0, float(np.mean(y / x))) if len(x) else cls(0.0, 1.0)
        a = np.stack([1 / y, x / y], 1)
        (base, scale), *_ = np.linalg.lstsq(a, np.ones(len(x)), rcond=None)
        if scale <= 0:
            return cls(float(np.mean(y)), 0.0)
        if base < 0:
            return cls(0.0, float(1 / np.mean(x / y)))
        return cls(float(base), float(scale))


@dataclass(frozen=True)
class Predictor:
    """Latency of a pipeline whose nodes run one after the other on the same cores.

    `affine[node][precision]` calibrates a node, `overhead_ms` is what is spent around the models, `correction` the
    residual fed back after a measured miss.
    """

    table: Table
    placed: dict[str, tuple[Placed, ...]]
    affine: dict[str, dict[str, Affine]]
    overhead_ms: float
    correction: float = 1.0

    def raw(self, node: str, kept: Kept, precision: str, rows: Mapping[tuple, Row] | None = None) -> float:
        """Sum of the table over the blocks of a node, in milliseconds per request."""
        rows = rows or self.table.lookup()
        total = 0.0
        for p in self.placed[node]:
            units = kept.get(p.name, p.units)
            total += self.block(rows, p, units, precision)
        return total

    @staticmethod
    def block(rows: Mapping[tuple, Row], p: Placed, units: int, precision: str) -> float:
        context = cost(rows, p.context, units, precision) if p.context else 0.0
        return p.calls * cost(rows, p.key, units, precision) + context

    def node(self, node: str, kept: Kept, precision: str, rows: Mapping[tuple, Row] | None = None) -> float:
        a = self.affine[node][precision]
        return a.base + a.scale * self.raw(node, kept, precision, rows)

    def __call__(self, candidate: Candidate) -> float:
        """Predicted p50 of a request in milliseconds."""
        rows = self.table.lookup()
        parts = (self.node(n, candidate.kept[n], candidate.precision[n], rows) for n in self.placed)
        return self.correction * (sum(parts) + self.overhead_ms)


def place(blocks: Sequence[Block], shapes: Mapping[str, object]) -> tuple[Placed, ...]:
    """Blocks with the shapes (`models.base.Shape`) they run at."""
    found = []
    for b in blocks:
        s = shapes[b.name]
        key = (b.kind, s.width, s.head or b.width, s.positions, s.keys, s.batch)  # type: ignore[attr-defined]
        context: Key | None = None
        if s.prefill:  # type: ignore[attr-defined]
            context = (b.kind, s.width, b.width, s.prefill, s.prefill, 1)  # type: ignore[attr-defined]
        elif b.kind == "cross_attention":
            context = ("context", s.width, b.width, s.keys, s.keys, 1)  # type: ignore[attr-defined]
        found.append(Placed(b.name, b.units, b.step, key, s.calls, context))  # type: ignore[attr-defined]
    return tuple(found)


def needs(placed: Mapping[str, Sequence[Placed]]) -> list[tuple[Key, int, int]]:
    """What the device table must hold: (key, units, step)."""
    found = []
    for p in (p for row in placed.values() for p in row):
        found.append((p.key, p.units, p.step))
        if p.context:
            found.append((p.context, p.units, p.step))
    return found
