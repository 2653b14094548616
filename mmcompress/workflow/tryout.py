"""Where cutting alone destroys a pipeline, losses before training say little: a few structures are trained for a while.

What the search ranks first then competes with what damage measured block by block adds up least for, and with plain
splits of the budget: successive halving by training (Jamieson and Talwalkar 2016), with one rung.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmcompress.measure.predict import Predictor
from mmcompress.records import Candidate, Trial, read, write
from mmcompress.search import moves
from mmcompress.search.moves import Problem
from mmcompress.workflow.choose import FULL, destroyed, plain_starts, problem, pruned
from mmcompress.workflow.state import Run

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

SHARE = 0.1
"""The share of the training budget that each gets."""
ALIKE = 0.03
"""Of structures that differ by no more of the weights one is trained."""
CHECKED = 256
"""Choosing pairs at most that a training is judged on."""


@dataclass(frozen=True)
class Tried:
    """A structure and its loss on choosing pairs after a short training."""

    candidate: Candidate
    origin: str
    loss: float


def tried_out(
    run: Run, ev: Evidence, predict: Predictor, budget_ms: float, trials: Sequence[Trial], best: Trial | None
) -> Trial | None:
    """The best trial, or where its loss is `STEEP` the structure that a short training serves best.

    What was tried is kept in the run folder: when the budget is corrected, the winner is fitted to it.
    """
    d, s = run.spec.distill, run.spec.search
    if best is None or best.latency_ms > budget_ms:
        return best
    if not (s.tryouts and d.steps and d.minutes) or s.judge == "estimated":
        return best
    if not destroyed(best.loss, choosing_loss(run, run.models)):
        return best
    p, record = problem(run, ev, predict, budget_ms), run.folder / "tryouts.json"
    if not record.exists():
        from mmcompress.distill.teacher import Teacher

        pool, teacher = _pool(run, ev, p, trials)[: s.tryouts], Teacher(run.pipeline, run.models)
        with run.timed("tryouts"):
            tried = [_try(run, ev, teacher, c, origin, f"{i + 1} of {len(pool)}") for i, (origin, c) in enumerate(pool)]
        write(record, {"tried": tried})
    winner = min(read(_Record, record).tried, key=lambda t: t.loss)
    fits = moves.trim(p, winner.candidate, ev.damage)
    if fits is None:
        return best
    c = moves.fill(p, fits, ev.damage, ev.rounding)
    return Trial(best.number, winner.origin, {}, c, p.predict(c), winner.loss, {}, 0.0)


@dataclass(frozen=True)
class _Record:
    tried: tuple[Tried, ...]


def _pool(run: Run, ev: Evidence, p: Problem, trials: Sequence[Trial]) -> list[tuple[str, Candidate]]:
    """Structures that use up the budget and differ, the best of every kind first: by loss, by damage, plain ones."""
    full = [t for t in trials if FULL * p.budget_ms <= t.latency_ms <= p.budget_ms]
    within = full or [t for t in trials if t.latency_ms <= p.budget_ms]
    by_loss = [(f"{t.origin}, least loss", t.candidate) for t in sorted(within, key=lambda t: t.loss)]
    whole = sorted(within, key=lambda t: added(ev, t.candidate))[:2]
    by_damage = [(f"{t.origin}, least damage", t.candidate) for t in whole]
    fitted = (moves.fit_to_budget(p, point)[1] for point in plain_starts(run, p))
    plain = [("plain split", moves.fill(p, c, ev.damage, ev.rounding)) for c in fitted if p.predict(c) <= p.budget_ms]
    found: list[tuple[str, Candidate]] = []
    for row in (*by_loss[:1], *by_damage[:1], *plain, *by_loss[1:], *by_damage[1:]):
        if all(_apart(p, row[1], c) > ALIKE for _, c in found):
            found.append(row)
    return found


def _apart(p: Problem, a: Candidate, b: Candidate) -> float:
    """The share of the weights in blocks that one structure has and the other has not; infinite of other precisions."""
    if a.precision != b.precision:
        return math.inf
    a, b = moves.spelled(p, a), moves.spelled(p, b)
    of = lambda x, y: x.weight * abs(y) if x.group != "tokens" else 0.0
    every = [(n, x) for n, blocks in p.blocks.items() for x in blocks]
    differ = sum(of(x, a.kept[n][x.name] - b.kept[n][x.name]) for n, x in every)
    moved = sum(abs(a.kept[n][x.name] - b.kept[n][x.name]) / x.units for n, x in every if x.group == "tokens")
    return float(differ / max(sum(of(x, x.units) for _, x in every), 1.0) + moved)


def added(ev: Evidence, c: Candidate) -> float:
    """The damage of every cut and rounding of a candidate, added up."""
    cuts = sum(ev.damage(n, b, k) for n, by in c.kept.items() for b, k in by.items())
    return cuts + sum(ev.rounding[n][of] for n, of in c.precision.items())


def _try(run: Run, ev: Evidence, teacher: Any, c: Candidate, origin: str, number: str) -> Tried:
    from mmcompress.distill.trainer import distill_

    d = run.spec.distill
    options = replace(
        d, steps=max(1, round(SHARE * d.steps)), minutes=SHARE * d.minutes, checks=0, patience=0, gentle=False
    )
    models = pruned(run, ev, c, run.spec.prune.refit)
    say = lambda what, share: run.say("tryout", f"{number} ({origin}): {what}", share)
    distill_(run.pipeline, models, teacher, run.data, options, run.spec.seed, say, clock=run.clock)
    loss = choosing_loss(run, models)
    run.say("tryout", f"{number} ({origin}): loss {loss:.3f} after training", None)
    return Tried(c, origin, loss)


def choosing_loss(run: Run, models: dict[str, Any]) -> float:
    """The pipeline's own loss on choosing pairs."""
    pairs = run.pipeline.batch(run.data.load("val", min(run.spec.data.choosing, CHECKED)))
    return float(run.pipeline.evaluate(models, pairs, dense=run.pipeline.anchors(run.models, pairs)))
