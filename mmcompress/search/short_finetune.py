"""Where cutting alone destroys a pipeline, losses before training say little: a few structures are trained for a while.

What the search ranks first then competes with what damage measured block by block adds up least for, and with plain
splits of the budget: successive halving by training (Jamieson and Talwalkar 2016), with one rung.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Trial
from mmcompress.search.build_problem import build_problem
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.evaluator import quality_collapsed
from mmcompress.search.problem import SearchProblem, complete_candidate, scale_to_budget
from mmcompress.search.repair import cut_to_budget, grow_to_budget
from mmcompress.search.run_search import FULL_BUDGET_SHARE, list_plain_starts
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext

FINETUNE_BUDGET_SHARE = 0.1
"""The share of the training budget that each gets."""


MIN_WEIGHT_DIFFERENCE = 0.03
"""Of structures that differ by no more of the weights one is trained."""


MAX_VALIDATION_PAIRS = 256
"""Choosing pairs at most that a training is judged on."""


@dataclass(frozen=True, kw_only=True)
class FinetunedStructure:
    """A structure and its loss on choosing pairs after a short training."""

    candidate: Candidate
    origin: str
    loss: float


def rank_by_short_finetuning(
    run: RunContext,
    ev: Sensitivity,
    *,
    predict: Predictor,
    budget_ms: float,
    trials: Sequence[Trial],
    best: Trial | None,
) -> Trial | None:
    """The best trial, or where its loss is `STEEP` the structure that a short training serves best.

    What was tried is kept in the run folder: when the budget is corrected, the winner is fitted to it.
    """
    d, s = run.spec.distill, run.spec.search
    if best is None or best.latency_ms > budget_ms:
        return best
    if not (s.short_finetunings and d.steps and d.minutes) or s.evaluator == "estimated":
        return best
    if not quality_collapsed(best.loss, validation_loss(run, run.models)):
        return best
    p, record = (
        build_problem(run, ev, predictor=predict, budget_ms=budget_ms),
        run.folder.short_finetunings,
    )
    if not record.exists():
        pool, teacher = (
            _pool(run, ev, p=p, trials=trials)[: s.short_finetunings],
            Teacher(run.pipeline, run.models),
        )
        with run.time_stage("tryouts"):
            tried = [
                _try(run, ev, teacher=teacher, c=c, origin=origin, number=f"{i + 1} of {len(pool)}")
                for i, (origin, c) in enumerate(pool)
            ]
        write_record(record, {"tried": tried})
    winner = min(read_record(_Record, record).tried, key=lambda t: t.loss)
    fits = cut_to_budget(p, winner.candidate, loss_increase=ev.loss_increase)
    if fits is None:
        return best
    c = grow_to_budget(p, fits, loss_increase=ev.loss_increase, rounding=ev.rounding)
    return Trial(
        number=best.number,
        origin=winner.origin,
        overrides={},
        candidate=c,
        latency_ms=p.predict(c),
        loss=winner.loss,
        quality={},
        evaluation_seconds=0.0,
    )


@dataclass(frozen=True)
class _Record:
    tried: tuple[FinetunedStructure, ...]


def _pool(
    run: RunContext, ev: Sensitivity, *, p: SearchProblem, trials: Sequence[Trial]
) -> list[tuple[str, Candidate]]:
    """Structures that use up the budget and differ, the best of every kind first: by loss, by damage, plain ones."""
    full = [t for t in trials if FULL_BUDGET_SHARE * p.budget_ms <= t.latency_ms <= p.budget_ms]
    within = full or [t for t in trials if t.latency_ms <= p.budget_ms]
    by_loss = [
        (f"{t.origin}, least loss", t.candidate) for t in sorted(within, key=lambda t: t.loss)
    ]
    whole = sorted(within, key=lambda t: add_loss_increases(ev, t.candidate))[:2]
    by_damage = [(f"{t.origin}, least damage", t.candidate) for t in whole]
    fitted = (scale_to_budget(p, point)[1] for point in list_plain_starts(p, run.spec))
    plain = [
        ("plain split", grow_to_budget(p, c, loss_increase=ev.loss_increase, rounding=ev.rounding))
        for c in fitted
        if p.predict(c) <= p.budget_ms
    ]
    found: list[tuple[str, Candidate]] = []
    for row in (*by_loss[:1], *by_damage[:1], *plain, *by_loss[1:], *by_damage[1:]):
        if all(_apart(p, row[1], b=c) > MIN_WEIGHT_DIFFERENCE for _, c in found):
            found.append(row)
    return found


def _apart(p: SearchProblem, a: Candidate, *, b: Candidate) -> float:
    """The share of the weights in blocks that one structure has and the other has not; infinite of other precisions."""
    if a.precision != b.precision:
        return math.inf
    a, b = complete_candidate(p, a), complete_candidate(p, b)
    of = lambda x, y: x.rows_and_columns_per_unit * abs(y) if x.group != "tokens" else 0.0
    every = [(n, x) for n, blocks in p.blocks.items() for x in blocks]
    differ = sum(of(x, a.kept_units[n][x.name] - b.kept_units[n][x.name]) for n, x in every)
    moved = sum(
        abs(a.kept_units[n][x.name] - b.kept_units[n][x.name]) / x.units
        for n, x in every
        if x.group == "tokens"
    )
    return float(differ / max(sum(of(x, x.units) for _, x in every), 1.0) + moved)


def add_loss_increases(ev: Sensitivity, c: Candidate) -> float:
    """The damage of every cut and rounding of a candidate, added up."""
    cuts = sum(ev.loss_increase(n, b, k) for n, by in c.kept_units.items() for b, k in by.items())
    return cuts + sum(ev.rounding[n][of] for n, of in c.precision.items())


def _try(
    run: RunContext, ev: Sensitivity, *, teacher: Any, c: Candidate, origin: str, number: str
) -> FinetunedStructure:

    d = run.spec.distill
    settings = replace(
        d,
        steps=max(1, round(FINETUNE_BUDGET_SHARE * d.steps)),
        minutes=FINETUNE_BUDGET_SHARE * d.minutes,
        validations=0,
        patience=0,
        find_learning_rate=False,
    )
    models = build_pruned_models(run, ev, candidate=c, refit=run.spec.prune.refit)
    say = lambda what, share: run.on_progress("tryout", f"{number} ({origin}): {what}", share)
    distill_models_(
        models,
        TrainingInputs(pipeline=run.pipeline, teacher=teacher, data=run.data),
        options=TrainingOptions(
            settings=settings, seed=run.spec.seed, on_progress=say, clock=run.clock
        ),
    )
    loss = validation_loss(run, models)
    run.on_progress("tryout", f"{number} ({origin}): loss {loss:.3f} after training", None)
    return FinetunedStructure(candidate=c, origin=origin, loss=loss)


def validation_loss(run: RunContext, models: dict[str, Any]) -> float:
    """The pipeline's own loss on choosing pairs."""
    pairs = run.pipeline.collate(
        run.data.load("val", min(run.spec.data.validation_pairs, MAX_VALIDATION_PAIRS))
    )
    return float(
        run.pipeline.loss_of_models(
            models, pairs, dense=run.pipeline.reference_outputs(run.models, pairs)
        )
    )
