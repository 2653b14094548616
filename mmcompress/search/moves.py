"""Moves in the space of candidates: to the budget, back to the space, from a good one to its neighbours; all pure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mmcompress.records import Block, Candidate, Trial
from mmcompress.spec.schema import Dimension, Space

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
            k: sum(b.units * b.rows_and_columns_per_unit for _, b, crossing in each if crossing == k)
            for k in (True, False)
        }
        if not all(whole.values()):
            return []
        return [
            (n, b.name, b.units, b.rows_and_columns_per_unit / whole[crossing], crossing) for n, b, crossing in each
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

    def nearest_choice(self, node: str, name: str, kept: int) -> int:
        options = self.unit_choices.get(node, {}).get(name)
        return min(options, key=lambda k: abs(k - kept)) if options else kept


def is_ratio(path: str) -> bool:
    return path.endswith((".prune.heads", ".prune.ffn", ".prune.tokens"))


def scale_to_budget(problem: SearchProblem, overrides: SearchPoint) -> tuple[SearchPoint, Candidate]:
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
            cuts = round((b.units - candidate.kept_units[node].get(b.name, b.units)) / b.granularity)
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
            point[path] = candidate.precision[node] if candidate.precision[node] in d.choices else d.choices[0]
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
    if d.step and d.step < 1:  # the last step may end under `high`, and rounding must not lift it over
        most = math.floor((high - low) / d.step + 1e-9)
        return min(low + d.step * min(round((value - low) / d.step), most), high)
    return int(low + d.step * ((value - low) // d.step)) if d.step else value


def best_within(trials: list[Trial], budget_ms: float) -> Trial | None:
    """The feasible trial of least loss, None when nothing meets the budget."""
    return min((t for t in trials if t.latency_ms <= budget_ms), key=lambda t: t.loss, default=None)


def complete(problem: SearchProblem, c: Candidate) -> Candidate:
    """The candidate with every block named."""
    kept = {n: {b.name: c.kept_units[n].get(b.name, b.units) for b in bs} for n, bs in problem.blocks.items()}
    return Candidate(kept, c.precision)


def cut_to_budget(problem: SearchProblem, candidate: Candidate, damage: LossIncrease) -> Candidate | None:
    """The candidate cut down to the budget, always where the least estimated damage is paid per millisecond."""
    now = complete(problem, candidate)
    latency = problem.predict(now)
    while latency > problem.budget_ms:
        best_price, pick = float("inf"), None
        for n, bs in problem.blocks.items():
            for b in bs:
                options = problem.unit_choices.get(n, {}).get(b.name, ())
                lower = [k for k in options if k <= now.kept_units[n][b.name] - max(b.granularity, b.units // 16)]
                if not lower:
                    continue
                new = _with(now, n, b.name, lower[-1])
                if not problem.is_allowed(new):
                    continue
                saved = latency - problem.predict(new)
                paid = damage(n, b.name, lower[-1]) - damage(n, b.name, now.kept_units[n][b.name])
                if saved > 1e-6 and max(paid, 1e-6) / saved < best_price:
                    best_price, pick = max(paid, 1e-6) / saved, new
        if pick is None:
            return None
        now, latency = pick, problem.predict(pick)
    return now


def restore_dropped(problem: SearchProblem, candidate: Candidate, damage: LossIncrease) -> Candidate:
    """The candidate with no more blocks gone than may be: those come back, at their smallest, whose loss hurts most.

    Where the protection does not hold, units of what it protects come back as well.
    """
    now = complete(problem, candidate)
    for n, most in problem.max_drops.items():
        gone = {
            b: min((k for k in problem.unit_choices[n][b] if k), default=0)
            for b, k in now.kept_units[n].items()
            if k == 0
        }
        gain = lambda b, n=n, gone=gone: damage(n, b, 0) - damage(n, b, gone[b])
        for b in sorted((b for b, least in gone.items() if least), key=gain, reverse=True)[: max(len(gone) - most, 0)]:
            now = _with(now, n, b, gone[b])
    return enforce_protection(problem, now, damage)


def enforce_protection(problem: SearchProblem, candidate: Candidate, damage: LossIncrease) -> Candidate:
    """The candidate with units given back until the protection holds, where most damage is undone for it."""
    now = complete(problem, candidate)
    while (excess := problem.protection_excess(now)) > 0:
        best_price, pick = -math.inf, None
        for n, b, k in _larger(problem, now, 16):
            if b not in problem.cross_modal.get(n, ()):
                continue
            new = _with(now, n, b, k)
            if (less := excess - problem.protection_excess(new)) > 1e-12:
                price = (damage(n, b, now.kept_units[n][b]) - damage(n, b, k)) / less
                best_price, pick = (price, new) if price > best_price else (best_price, pick)
        if pick is None:
            break
        now = pick
    return now


def _larger(problem: SearchProblem, now: Candidate, share: int) -> Iterator[tuple[str, str, int]]:
    """(node, block, units kept) of the next step up of every block, of at least a `share`-th of its units, or to its
    most."""
    for n, bs in problem.blocks.items():
        for b in bs:
            have, least = now.kept_units[n][b.name], max(1, b.units // share if share else 1)
            more = [k for k in problem.unit_choices.get(n, {}).get(b.name, ()) if k > have]
            if more:
                yield n, b.name, next((k for k in more if k >= have + least), more[-1])


def grow_to_budget(
    problem: SearchProblem, candidate: Candidate, damage: LossIncrease, rounding: Mapping[str, Mapping[str, float]]
) -> Candidate:
    """The candidate grown up to the budget, always where the most estimated damage is undone per millisecond.

    Units are given back, in large steps and then in small ones, or a node is left in a finer precision (`rounding`:
    damage by node and precision).
    """
    now = complete(problem, candidate)
    for share in (16, 0):
        while (new := _grown(problem, now, damage, rounding, share)) is not None:
            now = new
    return now


def trade_for_precision(
    problem: SearchProblem, candidate: Candidate, damage: LossIncrease, rounding: Mapping[str, Mapping[str, float]]
) -> list[Candidate]:
    """The candidate with one node in a finer precision that is too slow as it is, cut until it fits the budget."""
    found = []
    for n, p in ((n, p) for n, ps in problem.precisions.items() for p in ps):
        if rounding[n][p] < rounding[n][candidate.precision[n]]:
            finer = cut_to_budget(problem, Candidate(candidate.kept_units, {**candidate.precision, n: p}), damage)
            found += [grow_to_budget(problem, finer, damage, rounding)] if finer else []
    return found


def _grown(
    problem: SearchProblem,
    now: Candidate,
    damage: LossIncrease,
    rounding: Mapping[str, Mapping[str, float]],
    share: int,
) -> Candidate | None:
    """The best next step up within the budget, of at least a `share`-th of a block's units; None: there is none."""
    latency, worth, pick = problem.predict(now), 0.0, None
    steps: list[tuple[float, Candidate]] = []
    for n, b, k in _larger(problem, now, share):
        steps.append((damage(n, b, now.kept_units[n][b]) - damage(n, b, k), _with(now, n, b, k)))
    for n in problem.blocks:
        for p in problem.precisions.get(n, ()):
            undone = rounding[n][now.precision[n]] - rounding[n][p]
            if undone > 0:
                steps.append((undone, Candidate(now.kept_units, {**now.precision, n: p})))
    for undone, new in steps:
        added = problem.predict(new) - latency
        price = max(undone, 1e-9) / max(added, 1e-6)
        if latency + added <= problem.budget_ms and price > worth and problem.is_allowed(new):
            worth, pick = price, new
    return pick


def _with(c: Candidate, node: str, block: str, kept: int) -> Candidate:
    return Candidate({**c.kept_units, node: {**c.kept_units[node], block: kept}}, c.precision)


def switch_levels(
    problem: SearchProblem, top: Trial | None, seen: Collection[str], rng: random.Random
) -> Candidate | None:
    """A level switch (EvoPress, Sieberling et al. 2025): units given to some blocks, taken from others, in budget."""
    if top is None:
        return None
    places = [(n, b) for n, blocks in problem.blocks.items() for b in blocks]
    for _ in range(400):
        kept = {n: dict(k) for n, k in top.candidate.kept_units.items()}
        precision = dict(top.candidate.precision)
        if rng.random() < 0.15:
            node = rng.choice(list(precision))
            precision[node] = rng.choice(problem.precisions.get(node, ("fp32",)))
        for sign in (1, -1):
            for node, b in rng.sample(places, rng.choice((1, 1, 2))):
                size = b.granularity * (rng.choice((2, 4, 8)) if b.group == "ffn" else 1)
                now = kept[node].get(b.name, b.units)
                kept[node][b.name] = problem.nearest_choice(node, b.name, min(max(now + sign * size, 0), b.units))
        candidate = Candidate(kept, precision)
        latency = problem.predict(candidate)
        if (
            candidate.key() not in seen
            and problem.is_allowed(candidate)
            and 0.8 * problem.budget_ms <= latency <= problem.budget_ms
        ):
            return candidate
    return None
