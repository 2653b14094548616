"""Moves in the space of candidates: to the budget, back to the space, from a good one to its neighbours; all pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate
from mmcompress.results.records import Trial
from mmcompress.spec.space import Dimension, Space

SearchPoint = dict[str, Any]


Resolve = Callable[[SearchPoint], Candidate]


Predict = Callable[[Candidate], float]


LossIncrease = Callable[[str, str, int], float]
"""(node, block, units kept) -> estimated damage."""


BUDGET_SHARE = 0.995
"""Proposals are scaled to this share of the budget."""


@dataclass
class SearchProblem:
    """What is searched: dimensions, how overrides become a candidate, its predicted latency and the budget in ms."""

    space: Space
    blocks: dict[str, tuple[Block, ...]]
    resolve: Resolve
    predict: Predict
    budget_ms: float
    precisions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unit_choices: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """Kept counts each block may have, ascending; a block not listed is free."""
    max_drops: dict[str, int] = field(default_factory=dict)
    """How many blocks of a node may be gone whole; a node not listed is free."""
    cross_modal: Mapping[str, Collection[str]] = field(default_factory=dict)
    """The blocks where modalities meet, by node."""
    protection: float = 0.0
    """How many times less every structure loses of its cross-modal units than of the others."""

    @cached_property
    def _weights(self) -> list[tuple[str, str, int, float, bool]]:
        """Node, name and units of every block, its share of all cross-modal or unimodal ones, and which it is."""
        each = [
            (n, b, b.name in self.cross_modal.get(n, ()))
            for n, blocks in self.blocks.items()
            for b in blocks
            if b.group != "tokens"
        ]
        whole = {
            k: sum(
                b.units * b.rows_and_columns_per_unit for _, b, crossing in each if crossing == k
            )
            for k in (True, False)
        }
        if not all(whole.values()):
            return []
        return [
            (n, b.name, b.units, b.rows_and_columns_per_unit / whole[crossing], crossing)
            for n, b, crossing in each
        ]

    def removed_shares(self, candidate: Candidate) -> tuple[float, float]:
        """What a candidate has lost of its unimodal units, and of its cross-modal ones (`allocation.ratios`)."""
        lost = [0.0, 0.0]
        for n, name, units, each, crossing in self._weights:
            lost[crossing] += (units - candidate.kept_units[n].get(name, units)) * each
        return lost[0], lost[1]

    def protection_excess(self, candidate: Candidate) -> float:
        """By how much more is cut of what is protected than the protection allows; at most 0: it holds."""
        unimodal, cross_modal = self.removed_shares(candidate)
        return cross_modal * self.protection - unimodal - 1e-9

    def is_allowed(self, candidate: Candidate) -> bool:
        """Whether no node has lost more blocks than it may, and the protection holds."""
        gone = all(self._gone(candidate, n) <= most for n, most in self.max_drops.items())
        return gone and self.protection_excess(candidate) <= 0

    def _gone(self, candidate: Candidate, node: str) -> int:
        return sum(k == 0 for k in candidate.kept_units.get(node, {}).values())

    def nearest_choice(self, node: str, name: str, *, kept: int) -> int:
        options = self.unit_choices.get(node, {}).get(name)
        return min(options, key=lambda k: abs(k - kept)) if options else kept


def is_ratio(path: str) -> bool:
    return path.endswith((".prune.heads", ".prune.ffn", ".prune.tokens"))


def scale_to_budget(
    problem: SearchProblem, overrides: SearchPoint
) -> tuple[SearchPoint, Candidate]:
    """Scale the ratios of `overrides` together to the largest pipeline within the budget, by bisection."""

    def scaled(share: float) -> SearchPoint:
        out = dict(overrides)
        for path, value in overrides.items():
            if is_ratio(path):
                d = problem.space.dimensions.get(path)
                low, high = (d.low or 0.0, d.high or 0.0) if d else (0.0, 1.0)
                out[path] = round(min(max(float(value) * share, low), high), 4)
        return out

    low, high = 0.0, 8.0
    if problem.predict(problem.resolve(scaled(high))) > problem.budget_ms * BUDGET_SHARE:
        best = scaled(high)
        return best, problem.resolve(best)
    for _ in range(12):
        middle = (low + high) / 2
        if problem.predict(problem.resolve(scaled(middle))) > problem.budget_ms * BUDGET_SHARE:
            low = middle
        else:
            high = middle
    best = scaled(high)
    return best, problem.resolve(best)


def to_overrides(problem: SearchProblem, candidate: Candidate) -> SearchPoint:
    """Overrides that name every block: they give back exactly this candidate."""
    out: SearchPoint = {}
    for node, blocks in problem.blocks.items():
        for b in blocks:
            total = -(-b.units // b.granularity)
            cuts = round(
                (b.units - candidate.kept_units[node].get(b.name, b.units)) / b.granularity
            )
            out[f"nodes.{node}.prune.blocks.{b.name}"] = round(cuts / total, 5)
        out[f"nodes.{node}.precision"] = candidate.precision[node]
    return out


def to_search_point(problem: SearchProblem, candidate: Candidate) -> dict[str, Any]:
    """The point of the search space nearest to a candidate: group ratios, dropped sub-layers, precisions."""
    point: dict[str, Any] = {}
    for path, d in problem.space.dimensions.items():
        keys = path.split(".")
        if keys[0] != "nodes" and d.choices:
            point[path] = d.choices[0]
            continue
        if keys[0] != "nodes":
            unimodal, cross_modal = problem.removed_shares(candidate)
            point[path] = _clip(d, unimodal / cross_modal if cross_modal else d.high or 2.0)
            continue
        node, blocks = keys[1], problem.blocks[keys[1]]
        kept = candidate.kept_units[node]
        if keys[-1] == "precision":
            point[path] = (
                candidate.precision[node]
                if candidate.precision[node] in d.choices
                else d.choices[0]
            )
        elif keys[-1] == "drop":
            point[path] = _clip(d, sum(kept.get(b.name, b.units) == 0 for b in blocks))
        else:
            part = [b for b in blocks if b.group == keys[-1]]
            whole = sum(b.units for b in part)
            point[path] = _clip(d, 1 - sum(kept.get(b.name, b.units) for b in part) / max(whole, 1))
    return point


def _clip(d: Dimension, value: float) -> Any:
    low, high = d.low or 0.0, d.high if d.high is not None else value
    value = min(max(value, low), high)
    if (
        d.step and d.step < 1
    ):  # the last step may end under `high`, and rounding must not lift it over
        most = math.floor((high - low) / d.step + 1e-9)
        return min(low + d.step * min(round((value - low) / d.step), most), high)
    return int(low + d.step * ((value - low) // d.step)) if d.step else value


def best_within(trials: list[Trial], budget_ms: float) -> Trial | None:
    """The feasible trial of least loss, None when nothing meets the budget."""
    return min((t for t in trials if t.latency_ms <= budget_ms), key=lambda t: t.loss, default=None)


def complete(problem: SearchProblem, c: Candidate) -> Candidate:
    """The candidate with every block named."""
    kept = {
        n: {b.name: c.kept_units[n].get(b.name, b.units) for b in bs}
        for n, bs in problem.blocks.items()
    }
    return Candidate(kept, c.precision)
