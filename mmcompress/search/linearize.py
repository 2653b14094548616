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

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.search.build_problem import build_problem
from mmcompress.search.evaluator import TrialEvaluator, quality_collapsed
from mmcompress.search.problem import BUDGET_SHARE, SearchProblem, complete_candidate
from mmcompress.search.repair import cut_to_budget, grow_to_budget
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.split_budget import split_budget
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

STEP_EXPONENT = 0.5
"""How far beliefs move in a round: all the way they swing to and fro between two kinds of splits."""


MIN_REAL_SHARE = 0.1
"""The share of what was believed that a cut is taken to do at least: to undo one may well lower the loss by chance."""


SPLITS_PER_ROUND, MAX_SEED_SPLITS = 3, 4
"""Splits judged in a round, and given to the search."""


MAX_EFFORT_FACTOR = 2
"""Rounds end when they have judged so many times as many structures as the search will."""


@dataclass(frozen=True)
class EvaluatedSplit:
    """A split of the budget and its loss."""

    candidate: Candidate
    loss: float


@dataclass(frozen=True, kw_only=True)
class InteractionFactors:
    """How many times more than alone a cut does where others are: factors by node and block, of rounding by node."""

    rounds: int = 0
    cuts: dict[str, dict[str, float]] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    splits: tuple[EvaluatedSplit, ...] = ()
    measured_splits: tuple[str, ...] = ()
    """Keys of the splits that damage was measured in."""
    evaluations: int = 0
    """Structures judged for it."""
    losses: tuple[float, ...] = ()
    """The least loss of each round's splits, and the `dense` one."""
    dense_loss: float = 0.0


def load_interaction_factors(folder: RunFolder) -> InteractionFactors:
    """What is on record in a run folder."""
    record = folder.interaction_factors
    return read_record(InteractionFactors, record) if record.exists() else InteractionFactors()


def max_evaluations(run: RunContext) -> int:
    """How many structures are judged for it at most."""
    s = run.spec.search
    if s.evaluator == "estimated" or not s.linearization_rounds:
        return 0
    once = SPLITS_PER_ROUND + sum(len(m) for m in run.blocks.values()) + len(run.blocks)
    return (
        min(s.linearization_rounds * once, MAX_EFFORT_FACTOR * (s.trials + s.level_switches) + once)
        + SPLITS_PER_ROUND
    )


def linearize_successively(
    run: RunContext, ev: Sensitivity, *, predict: Predictor, budget_ms: float, who: TrialEvaluator
) -> tuple[Sensitivity, list[Candidate]]:
    """(evidence with damage as it is among other cuts, the best splits found on the way, least loss first).

    What was measured is kept in the run folder. It holds as well for a budget that has moved: splits are fitted to it,
    and the last is then a new one, not judged yet. Where all of them destroy the pipeline: the evidence as it was, and
    none.
    """
    if not max_evaluations(run):
        return ev, []
    p, known = (
        build_problem(run, ev, predictor=predict, budget_ms=budget_ms),
        load_interaction_factors(run.folder),
    )
    with run.time_stage("relinearize"):
        while known.rounds <= run.spec.search.linearization_rounds:
            more = _round(run, ev, predict=predict, p=p, who=who, known=known)
            if more is None:  # another budget may be within reach, another time they may be judged
                break
            known = more
            write_record(run.folder.interaction_factors, known)
        if not known.losses or quality_collapsed(min(known.losses), known.dense_loss):
            return ev, []
        inside = ev.scale_loss_increases(known.cuts, known.rounding)
        best = [s.candidate for s in sorted(known.splits, key=lambda s: s.loss)[:MAX_SEED_SPLITS]]
        fitted = (*_fitted(p, inside, found=best), *_splits(run, inside, predict=predict, p=p)[:1])
    return inside, list({c.key(): c for c in fitted}.values())


def _round(
    run: RunContext,
    ev: Sensitivity,
    *,
    predict: Predictor,
    p: SearchProblem,
    who: TrialEvaluator,
    known: InteractionFactors,
) -> InteractionFactors | None:
    """Splits by what is known, judged, and damage measured in the best one where it was not before.

    Where it was measured in all of them these were the last ones. None: there is no split, or none can be judged.
    """
    s, old = run.spec.search, {x.candidate.key(): x for x in known.splits}
    fresh = {
        c.key(): c
        for c in _splits(run, ev.scale_loss_increases(known.cuts, known.rounding), predict=predict, p=p)
    }
    asked = {key: c for key, c in fresh.items() if key not in old}
    told = f"split {known.rounds + 1} of {s.linearization_rounds + 1}"
    whole = Candidate(
        {n: {b.name: b.units for b in of} for n, of in run.blocks.items()},
        dict.fromkeys(run.blocks, "fp32"),
    )
    said = who.evaluate_all(
        asked if known.rounds else {**asked, "": whole},
        evaluate=who.evaluate,
        on_progress=run.on_progress,
        message=told,
    )
    dense = said.pop("", known.dense_loss)
    new = {
        key: EvaluatedSplit(asked[key], loss) for key, loss in said.items() if math.isfinite(loss)
    }
    every = {**old, **new}
    found = sorted((every[key] for key in fresh if key in every), key=lambda x: x.loss)
    if not found:
        return None
    run.on_progress("search", f"{told}: loss {found[0].loss:.3f}", None)
    judged, losses = (
        known.evaluations + len(said) + (not known.rounds),
        (*known.losses, found[0].loss),
    )
    known = replace(
        known, splits=tuple(every.values()), evaluations=judged, losses=losses, dense_loss=dense
    )
    at = next((x for x in found if x.candidate.key() not in known.measured_splits), None)
    enough = (
        known.evaluations >= MAX_EFFORT_FACTOR * (s.trials + s.level_switches)
        or known.rounds == s.linearization_rounds
    )
    if at is None or enough:
        return replace(known, rounds=s.linearization_rounds + 1)
    asked_of = _undone(run, p, c=at.candidate)
    without = who.evaluate_all(
        asked_of,
        evaluate=who.evaluate,
        on_progress=run.on_progress,
        message=f"what each cut does in it, round {known.rounds + 1}",
    )
    cuts, rounding = _moved(ev, known, at=at, without=without)
    return replace(
        known,
        rounds=known.rounds + 1,
        cuts=cuts,
        rounding=rounding,
        measured_splits=(*known.measured_splits, at.candidate.key()),
        evaluations=known.evaluations + len(asked_of),
    )


def _splits(
    run: RunContext, now: Sensitivity, *, predict: Predictor, p: SearchProblem
) -> list[Candidate]:
    """The best splits by what is believed, within every limit, and filled up to them."""
    return _fitted(
        p,
        now,
        found=split_budget(p, now, predictor=predict, budget_ms=p.budget_ms * BUDGET_SHARE)[
            :SPLITS_PER_ROUND
        ],
    )


def _fitted(p: SearchProblem, now: Sensitivity, *, found: Sequence[Candidate]) -> list[Candidate]:
    trimmed = (cut_to_budget(p, c, loss_increase=now.loss_increase) for c in found)
    return [
        grow_to_budget(p, c, loss_increase=now.loss_increase, rounding=now.rounding)
        for c in trimmed
        if c
    ]


def _undone(run: RunContext, p: SearchProblem, *, c: Candidate) -> dict[tuple[str, str], Candidate]:
    """The structure without one of its cuts, by node and block, or with a node in fp32 (no block), where it is free."""
    c, found = complete_candidate(p, c), {}
    for n, blocks in run.blocks.items():
        for b in blocks:
            if (
                c.kept_units[n][b.name] < b.units
                and len(p.unit_choices.get(n, {}).get(b.name, ())) != 1
            ):
                found[n, b.name] = Candidate(
                    {**c.kept_units, n: {**c.kept_units[n], b.name: b.units}}, c.precision
                )
        if c.precision[n] != "fp32" and len(p.precisions.get(n, ())) != 1:
            found[n, ""] = Candidate(c.kept_units, {**c.precision, n: "fp32"})
    return found


def _moved(
    ev: Sensitivity,
    known: InteractionFactors,
    *,
    at: EvaluatedSplit,
    without: Mapping[tuple[str, str], float],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Factors after the losses of a split `without` each of its cuts."""
    alone, cuts, rounding = (
        ev.scale_loss_increases({}, {}),
        {n: dict(by) for n, by in known.cuts.items()},
        dict(known.rounding),
    )

    def moved(factor: float, before: float, loss: float) -> float:
        real = max(at.loss - loss, MIN_REAL_SHARE * factor * before)
        return float(factor ** (1 - STEP_EXPONENT) * (real / before) ** STEP_EXPONENT)

    for (n, name), loss in without.items():
        if not math.isfinite(loss):
            continue
        if name:
            by = cuts.setdefault(n, {})
            by[name] = moved(
                by.get(name, 1.0),
                alone.loss_increase(n, name, at.candidate.kept_units[n][name]),
                loss,
            )
        else:
            rounding[n] = moved(
                rounding.get(n, 1.0), alone.rounding[n][at.candidate.precision[n]], loss
            )
    return cuts, rounding
