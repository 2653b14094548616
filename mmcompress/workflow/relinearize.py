"""Damage adds up only while little is cut: around a split of the budget it is measured anew, and the split made again.

Successive linearization. In the best split of a round every block that was cut is given back whole, alone: by how much
the loss then falls is what its cut does there. Curves keep their shape and are scaled half the way (of logarithms).

Where even the best split destroys the pipeline nothing of it is believed: what mends a wreck before training is not
what training needs most. (clip_captioner at 4x: a structure found so had a loss of .46 instead of .54 before it, .137
instead of .127 after it.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmcompress.measure.predict import Predictor
from mmcompress.records import Candidate, read, write
from mmcompress.search import moves
from mmcompress.search.moves import Problem
from mmcompress.workflow.choose import Jury, destroyed, problem, splits
from mmcompress.workflow.state import Run

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

RECORD = "relinearized.json"
HALF = 0.5
"""How far beliefs move in a round: all the way they swing to and fro between two kinds of splits."""
LEAST = 0.1
"""The share of what was believed that a cut is taken to do at least: to undo one may well lower the loss by chance."""
BEST, SEEDS = 3, 4
"""Splits judged in a round, and given to the search."""
MOST = 2
"""Rounds end when they have judged so many times as many structures as the search will."""


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
    """Keys of the splits that damage was measured in."""
    judged: int = 0
    """Structures judged for it."""
    losses: tuple[float, ...] = ()
    """The least loss of each round's splits, and the `dense` one."""
    dense: float = 0.0


def beliefs(folder: Path) -> Beliefs:
    """What is on record in a run folder."""
    record = folder / RECORD
    return read(Beliefs, record) if record.exists() else Beliefs()


def evaluations(run: Run) -> int:
    """How many structures are judged for it at most."""
    s = run.spec.search
    if s.judge == "estimated" or not s.relinearize:
        return 0
    once = BEST + sum(len(m) for m in run.blocks.values()) + len(run.blocks)
    return min(s.relinearize * once, MOST * (s.trials + s.mutations) + once) + BEST


def relinearized(
    run: Run, ev: Evidence, predict: Predictor, budget_ms: float, who: Jury
) -> tuple[Evidence, list[Candidate]]:
    """(evidence with damage as it is among other cuts, the best splits found on the way, least loss first).

    What was measured is kept in the run folder. It holds as well for a budget that has moved: splits are fitted to it,
    and the last is then a new one, not judged yet. Where all of them destroy the pipeline: the evidence as it was, and
    none.
    """
    if not evaluations(run):
        return ev, []
    p, known = problem(run, ev, predict, budget_ms), beliefs(run.folder)
    with run.timed("relinearize"):
        while known.rounds <= run.spec.search.relinearize:
            more = _round(run, ev, predict, p, who, known)
            if more is None:  # another budget may be within reach, another time they may be judged
                break
            known = more
            write(run.folder / RECORD, known)
        if not known.losses or destroyed(min(known.losses), known.dense):
            return ev, []
        inside = ev.scaled(known.cuts, known.rounding)
        best = [s.candidate for s in sorted(known.splits, key=lambda s: s.loss)[:SEEDS]]
        fitted = (*_fitted(p, inside, best), *_splits(run, inside, predict, p)[:1])
    return inside, list({c.key(): c for c in fitted}.values())


def _round(run: Run, ev: Evidence, predict: Predictor, p: Problem, who: Jury, known: Beliefs) -> Beliefs | None:
    """Splits by what is known, judged, and damage measured in the best one where it was not before.

    Where it was measured in all of them these were the last ones. None: there is no split, or none can be judged.
    """
    s, old = run.spec.search, {x.candidate.key(): x for x in known.splits}
    fresh = {c.key(): c for c in _splits(run, ev.scaled(known.cuts, known.rounding), predict, p)}
    asked = {key: c for key, c in fresh.items() if key not in old}
    told = f"split {known.rounds + 1} of {s.relinearize + 1}"
    whole = Candidate(
        {n: {b.name: b.units for b in of} for n, of in run.blocks.items()}, dict.fromkeys(run.blocks, "fp32")
    )
    said = who.losses(who.judge, asked if known.rounds else {**asked, "": whole}, run.say, told)
    dense = said.pop("", known.dense)
    new = {key: Split(asked[key], loss) for key, loss in said.items() if math.isfinite(loss)}
    every = {**old, **new}
    found = sorted((every[key] for key in fresh if key in every), key=lambda x: x.loss)
    if not found:
        return None
    run.say("search", f"{told}: loss {found[0].loss:.3f}", None)
    judged, losses = known.judged + len(said) + (not known.rounds), (*known.losses, found[0].loss)
    known = replace(known, splits=tuple(every.values()), judged=judged, losses=losses, dense=dense)
    at = next((x for x in found if x.candidate.key() not in known.measured), None)
    enough = known.judged >= MOST * (s.trials + s.mutations) or known.rounds == s.relinearize
    if at is None or enough:
        return replace(known, rounds=s.relinearize + 1)
    asked_of = _undone(run, p, at.candidate)
    without = who.losses(who.judge, asked_of, run.say, f"what each cut does in it, round {known.rounds + 1}")
    cuts, rounding = _moved(ev, known, at, without)
    return replace(
        known,
        rounds=known.rounds + 1,
        cuts=cuts,
        rounding=rounding,
        measured=(*known.measured, at.candidate.key()),
        judged=known.judged + len(asked_of),
    )


def _splits(run: Run, now: Evidence, predict: Predictor, p: Problem) -> list[Candidate]:
    """The best splits by what is believed, within every limit, and filled up to them."""
    return _fitted(p, now, [c for _, c in splits(run, now, predict, p.budget_ms * moves.MARGIN, p)[:BEST]])


def _fitted(p: Problem, now: Evidence, found: Sequence[Candidate]) -> list[Candidate]:
    trimmed = (moves.trim(p, c, now.damage) for c in found)
    return [moves.fill(p, c, now.damage, now.rounding) for c in trimmed if c]


def _undone(run: Run, p: Problem, c: Candidate) -> dict[tuple[str, str], Candidate]:
    """The structure without one of its cuts, by node and block, or with a node in fp32 (no block), where it is free."""
    c, found = moves.spelled(p, c), {}
    for n, blocks in run.blocks.items():
        for b in blocks:
            if c.kept[n][b.name] < b.units and len(p.choices.get(n, {}).get(b.name, ())) != 1:
                found[n, b.name] = Candidate({**c.kept, n: {**c.kept[n], b.name: b.units}}, c.precision)
        if c.precision[n] != "fp32" and len(p.precisions.get(n, ())) != 1:
            found[n, ""] = Candidate(c.kept, {**c.precision, n: "fp32"})
    return found


def _moved(
    ev: Evidence, known: Beliefs, at: Split, without: Mapping[tuple[str, str], float]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Factors after the losses of a split `without` each of its cuts."""
    alone, cuts, rounding = ev.scaled({}, {}), {n: dict(by) for n, by in known.cuts.items()}, dict(known.rounding)

    def moved(factor: float, before: float, loss: float) -> float:
        real = max(at.loss - loss, LEAST * factor * before)
        return float(factor ** (1 - HALF) * (real / before) ** HALF)

    for (n, name), loss in without.items():
        if not math.isfinite(loss):
            continue
        if name:
            by = cuts.setdefault(n, {})
            by[name] = moved(by.get(name, 1.0), alone.damage(n, name, at.candidate.kept[n][name]), loss)
        else:
            rounding[n] = moved(rounding.get(n, 1.0), alone.rounding[n][at.candidate.precision[n]], loss)
    return cuts, rounding
