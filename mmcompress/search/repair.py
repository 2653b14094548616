"""TODO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from mmcompress.graph.structure import Candidate
from mmcompress.search.problem import LossIncrease, SearchProblem, complete


def cut_to_budget(
    problem: SearchProblem, candidate: Candidate, *, damage: LossIncrease
) -> Candidate | None:
    """The candidate cut down to the budget, always where the least estimated damage is paid per millisecond."""
    now = complete(problem, candidate)
    latency = problem.predict(now)
    while latency > problem.budget_ms:
        best_price, pick = float("inf"), None
        for n, bs in problem.blocks.items():
            for b in bs:
                options = problem.unit_choices.get(n, {}).get(b.name, ())
                lower = [
                    k
                    for k in options
                    if k <= now.kept_units[n][b.name] - max(b.granularity, b.units // 16)
                ]
                if not lower:
                    continue
                new = _with(now, n, block=b.name, kept=lower[-1])
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


def restore_dropped(
    problem: SearchProblem, candidate: Candidate, *, damage: LossIncrease
) -> Candidate:
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
        for b in sorted((b for b, least in gone.items() if least), key=gain, reverse=True)[
            : max(len(gone) - most, 0)
        ]:
            now = _with(now, n, block=b, kept=gone[b])
    return enforce_protection(problem, now, damage=damage)


def enforce_protection(
    problem: SearchProblem, candidate: Candidate, *, damage: LossIncrease
) -> Candidate:
    """The candidate with units given back until the protection holds, where most damage is undone for it."""
    now = complete(problem, candidate)
    while (excess := problem.protection_excess(now)) > 0:
        best_price, pick = -math.inf, None
        for n, b, k in _larger(problem, now, share=16):
            if b not in problem.cross_modal.get(n, ()):
                continue
            new = _with(now, n, block=b, kept=k)
            if (less := excess - problem.protection_excess(new)) > 1e-12:
                price = (damage(n, b, now.kept_units[n][b]) - damage(n, b, k)) / less
                best_price, pick = (price, new) if price > best_price else (best_price, pick)
        if pick is None:
            break
        now = pick
    return now


def _larger(
    problem: SearchProblem, now: Candidate, *, share: int
) -> Iterator[tuple[str, str, int]]:
    """(node, block, units kept) of the next step up of every block, of at least a `share`-th of its units, or to its
    most."""
    for n, bs in problem.blocks.items():
        for b in bs:
            have, least = now.kept_units[n][b.name], max(1, b.units // share if share else 1)
            more = [k for k in problem.unit_choices.get(n, {}).get(b.name, ()) if k > have]
            if more:
                yield n, b.name, next((k for k in more if k >= have + least), more[-1])


def grow_to_budget(
    problem: SearchProblem,
    candidate: Candidate,
    *,
    damage: LossIncrease,
    rounding: Mapping[str, Mapping[str, float]],
) -> Candidate:
    """The candidate grown up to the budget, always where the most estimated damage is undone per millisecond.

    Units are given back, in large steps and then in small ones, or a node is left in a finer precision (`rounding`:
    damage by node and precision).
    """
    now = complete(problem, candidate)
    for share in (16, 0):
        while (
            new := _grown(problem, now, damage=damage, rounding=rounding, share=share)
        ) is not None:
            now = new
    return now


def trade_for_precision(
    problem: SearchProblem,
    candidate: Candidate,
    *,
    damage: LossIncrease,
    rounding: Mapping[str, Mapping[str, float]],
) -> list[Candidate]:
    """The candidate with one node in a finer precision that is too slow as it is, cut until it fits the budget."""
    found = []
    for n, p in ((n, p) for n, ps in problem.precisions.items() for p in ps):
        if rounding[n][p] < rounding[n][candidate.precision[n]]:
            finer = cut_to_budget(
                problem,
                Candidate(candidate.kept_units, {**candidate.precision, n: p}),
                damage=damage,
            )
            found += (
                [grow_to_budget(problem, finer, damage=damage, rounding=rounding)] if finer else []
            )
    return found


def _grown(
    problem: SearchProblem,
    now: Candidate,
    *,
    damage: LossIncrease,
    rounding: Mapping[str, Mapping[str, float]],
    share: int,
) -> Candidate | None:
    """The best next step up within the budget, of at least a `share`-th of a block's units; None: there is none."""
    latency, worth, pick = problem.predict(now), 0.0, None
    steps: list[tuple[float, Candidate]] = []
    for n, b, k in _larger(problem, now, share=share):
        steps.append(
            (damage(n, b, now.kept_units[n][b]) - damage(n, b, k), _with(now, n, block=b, kept=k))
        )
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


def _with(c: Candidate, node: str, *, block: str, kept: int) -> Candidate:
    return Candidate({**c.kept_units, node: {**c.kept_units[node], block: kept}}, c.precision)
