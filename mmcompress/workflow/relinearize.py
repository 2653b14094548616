"""Damage adds up only while little is cut: around a split of the budget it is measured anew, and the split made again.

Successive linearization. In the best structure so far every block that was cut is given back whole, alone: by how much
the loss then falls is what its cut does there. Curves keep their shape and are scaled half the way (of logarithms).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmcompress.measure.predict import Predictor
from mmcompress.records import Candidate, read, write
from mmcompress.search import moves
from mmcompress.search.moves import Problem
from mmcompress.workflow.choose import Jury, problem, splits
from mmcompress.workflow.state import Run

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

RECORD = "relinearized.json"
HALF = 0.5
"""How far beliefs move in a round: all the way they swing to and fro between two kinds of splits."""
BEST, TINY = 3, 1e-5
"""Splits judged in a round; the least that a cut is taken to do."""


@dataclass(frozen=True)
class Split:
    """A split of the budget and its loss."""

    candidate: Candidate
    loss: float


@dataclass(frozen=True)
class Beliefs:
    """How many times more than alone a cut does where others are: factors by node and block, of rounding by node."""

    rounds: int = 0
    cuts: dict[str, dict[str, float]] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    splits: tuple[Split, ...] = ()
    measured: tuple[str, ...] = ()
    """Keys of the structures that damage was measured in."""


def evaluations(run: Run) -> int:
    """How many structures are judged for it at most."""
    s = run.spec.search
    if s.judge == "estimated" or not s.relinearize:
        return 0
    blocks = sum(len(m) for m in run.blocks.values())
    return s.relinearize * (blocks + len(run.blocks)) + BEST * (s.relinearize + 1)


def relinearized(
    run: Run, ev: Evidence, predict: Predictor, budget_ms: float, who: Jury
) -> tuple[Evidence, list[Candidate]]:
    """(evidence with damage as it is in place, the splits that led there, least loss first).

    What was measured is kept in the run folder, and holds as well for a budget that has moved.
    """
    rounds, record = run.spec.search.relinearize, run.folder / RECORD
    if not evaluations(run):
        return ev, []
    p, known = problem(run, ev, predict, budget_ms), read(Beliefs, record) if record.exists() else Beliefs()
    with run.timed("relinearize"):
        while known.rounds <= rounds:
            now = ev.scaled(known.cuts, known.rounding)
            found = _judged(run, now, predict, p, who, known)
            if not found:
                break
            best, told = min(found, key=lambda s: s.loss), f"split {known.rounds + 1} of {rounds + 1}"
            run.say("search", f"{told}: loss {best.loss:.3f}", known.rounds / (rounds + 1))
            seen = {s.candidate.key(): s for s in (*known.splits, *found)}
            again = best.candidate.key() in known.measured  # beliefs have settled
            last = known.rounds == rounds or again
            cuts, rounding = (known.cuts, known.rounding) if last else _moved(run, ev, p, who, known, best)
            done = rounds + 1 if last else known.rounds + 1
            known = Beliefs(done, cuts, rounding, tuple(seen.values()), (*known.measured, best.candidate.key()))
            write(record, known)
    within = [s for s in known.splits if p.predict(s.candidate) <= budget_ms]
    return ev.scaled(known.cuts, known.rounding), [s.candidate for s in sorted(within, key=lambda s: s.loss)]


def _judged(run: Run, now: Evidence, predict: Predictor, p: Problem, who: Jury, known: Beliefs) -> list[Split]:
    """The best splits by what is believed now, filled up to the budget, with their losses."""
    best = [c for _, c in splits(run, now, predict, p.budget_ms * moves.MARGIN, p)[:BEST]]
    fitted = {c.key(): c for c in (moves.fill(p, c, now.damage, now.rounding) for c in best)}
    old = {s.candidate.key(): s.loss for s in known.splits}
    new = who.losses(who.judge, {k: c for k, c in fitted.items() if k not in old}, run.say)
    losses = {**old, **new}
    return [Split(c, losses[k]) for k, c in fitted.items() if math.isfinite(losses[k])]


def _moved(
    run: Run, ev: Evidence, p: Problem, who: Jury, known: Beliefs, at: Split
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Beliefs after every cut and rounding of a structure was undone alone."""
    alone, c = ev.scaled({}, {}), moves.spelled(p, at.candidate)
    asked: dict[tuple[str, str], Candidate] = {}
    for n, blocks in run.blocks.items():
        for b in blocks:
            if c.kept[n][b.name] < b.units:
                asked[n, b.name] = Candidate({**c.kept, n: {**c.kept[n], b.name: b.units}}, c.precision)
        if c.precision[n] != "fp32":
            asked[n, ""] = Candidate(c.kept, {**c.precision, n: "fp32"})
    losses = who.losses(who.judge, asked, run.say)
    cuts = {n: dict(known.cuts.get(n, {})) for n in run.blocks}
    rounding = dict(known.rounding)

    def between(factor: float, before: float, without: float) -> float:
        if not math.isfinite(without):
            return factor
        real = max(at.loss - without, TINY)
        return float(factor ** (1 - HALF) * (real / before) ** HALF)

    for (n, name), without in losses.items():
        if name:
            cuts[n][name] = between(cuts[n].get(name, 1.0), alone.damage(n, name, c.kept[n][name]), without)
        else:
            rounding[n] = between(rounding.get(n, 1.0), alone.rounding[n][c.precision[n]], without)
    return cuts, rounding
