"""The search under a budget: what is searched, who judges, and models of a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Trial
from mmcompress.search.build_problem import build_problem, find_fastest
from mmcompress.search.evaluator import TrialEvaluator
from mmcompress.search.problem import BUDGET_SHARE, SearchProblem, to_search_point
from mmcompress.search.repair import cut_to_budget, grow_to_budget, trade_for_precision
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.split_budget import split_budget
from mmcompress.search.study import SearchEffort, finished_trials, open_study, run_study
from mmcompress.workspace.context import RunContext

EXTRA_TRIALS = 5
"""Proposals and mutations by which the search goes on when a measured miss has moved the budget."""


FULL_BUDGET_SHARE = 0.985
"""A structure that takes less than this share of the budget is given units back until it does not."""


def choose_trial(
    run: RunContext, who: TrialEvaluator, *, trials: Sequence[Trial], budget_ms: float
) -> Trial | None:
    """The trial within the budget that stands best on all pairs, with that loss: the first few are judged on more.

    Those that leave some of the budget unused are passed over: what was grown out of them is there. Where none is
    within the budget, the fastest. Raises `ClusterError` when a worker is gone.
    """
    within = _finalists(run, trials, budget_ms=budget_ms, least=FULL_BUDGET_SHARE) or _finalists(
        run, trials, budget_ms=budget_ms
    )
    if not within:
        return min(trials, key=lambda t: t.latency_ms, default=None)
    if who.evaluate_again is None or len(within) == 1:
        return within[0]
    with run.time_stage("search"):
        new = {
            t.candidate.key(): t.candidate
            for t in within
            if t.candidate.key() not in who.final_losses
        }
        who.final_losses.update(
            who.evaluate_all(
                who.evaluate_again,
                new,
                say=run.on_progress,
                what=f"the best {len(within)} on more pairs",
            )
        )
    whole = [
        replace(t, loss=who.share * t.loss + (1 - who.share) * who.final_losses[t.candidate.key()])
        for t in within
    ]
    return min(whole, key=lambda t: t.loss)


def _finalists(
    run: RunContext, trials: Sequence[Trial], *, budget_ms: float, least: float = 0.0
) -> list[Trial]:
    """The best few that take at most the budget, and at least a share of it."""
    within = (t for t in trials if least * budget_ms <= t.latency_ms <= budget_ms)
    return sorted(within, key=lambda t: t.loss)[: run.spec.search.finalists]


def run_search(
    run: RunContext,
    ev: Sensitivity,
    *,
    predict: Predictor,
    budget_ms: float,
    who: TrialEvaluator,
    attempt: int = 0,
    known: Sequence[Candidate] = (),
    blind: int | None = None,
) -> list[Trial]:
    """Run (or go on with) the study of this run folder, from the structures that are `known` to be good.

    `blind`: without a head start, and with so many more trials in its place.
    """

    p = build_problem(run, ev, predict=predict, budget_ms=budget_ms)
    with run.time_stage("search"):
        book = open_study(
            run.folder.study, run.spec.seed, sampler=run.spec.search.sampler
        )
        led = blind is None
        best = (
            list(known)
            or [
                c
                for _, c in split_budget(
                    run, ev, predict=predict, budget_ms=budget_ms * BUDGET_SHARE, p=p
                )[:4]
            ]
            if led
            else []
        )
        best = best if best or not led else [find_fastest(p, predict)]
        starts = [to_search_point(p, c) for c in best[:3]] + (
            list_plain_starts(run, p) if led else []
        )
        seeds = [("knapsack", c) for c in best]
        if attempt and led:  # the best direction so far, to be scaled to the corrected budget
            judged = sorted(finished_trials(book), key=lambda t: t.loss)[:6]
            starts = [to_search_point(p, t.candidate) for t in judged[:2]]
            cut = [
                c for t in judged if (c := cut_to_budget(p, t.candidate, damage=ev.loss_increase))
            ]
            seeds = [("trimmed", c) for c in cut] + (seeds if known else seeds[:1])
        s = run.spec.search
        more = SearchEffort(
            trials=s.trials + EXTRA_TRIALS * attempt,
            level_switches=s.level_switches + EXTRA_TRIALS * attempt,
            workers=who.workers,
            retries=s.retries,
        )
        if blind is not None:  # as many as the others can come to, with seeds and what is grown
            seeded = (1 + attempt) * (s.finalists + len(run.blocks)) + 5 + 11 * attempt + blind
            more = replace(
                more, trials=more.trials + more.level_switches + seeded, level_switches=0
            )
        say = lambda what, share: run.on_progress("search", what, share)
        trials = run_study(
            book,
            p,
            executor=who.executor,
            evaluate=who.evaluate,
            starts=starts,
            seeds=seeds,
            effort=more,
            seed=run.spec.seed,
            progress=say,
        )
        held = lambda found: (
            [t for t in found if p.is_allowed(t.candidate)] or found
        )  # of an older journal
        if not led:
            return held(trials)
        wanting = [
            t.candidate
            for t in _finalists(run, trials, budget_ms=budget_ms)
            if t.latency_ms < FULL_BUDGET_SHARE * budget_ms
        ]
        grown = [
            ("filled", grow_to_budget(p, c, damage=ev.loss_increase, rounding=ev.rounding))
            for c in wanting
        ]
        small = [
            c for _, c in grown if p.predict(c) < FULL_BUDGET_SHARE * budget_ms
        ]  # the next step up is too large
        grown += [
            ("exchanged", c)
            for c in (
                trade_for_precision(p, small[0], damage=ev.loss_increase, rounding=ev.rounding)
                if small
                else ()
            )
        ]
        if grown:
            trials = run_study(
                book,
                p,
                executor=who.executor,
                evaluate=who.evaluate,
                starts=[],
                seeds=grown,
                effort=more,
                seed=run.spec.seed,
                progress=say,
            )
        return held(trials)


def adjust_structure(
    run: RunContext,
    ev: Sensitivity,
    *,
    predict: Predictor,
    budget_ms: float,
    who: TrialEvaluator,
    structure: Candidate,
) -> Trial | None:
    """A structure fitted to a budget that has moved a little, judged; None where no unit is small enough for that.

    Of many structures the search finds those that the predictor underrates (the winner's curse); of this one it is
    known by how much.
    """

    p = replace(
        build_problem(run, ev, predict=predict, budget_ms=budget_ms), precisions={}
    )  # in another precision it is another structure
    small = cut_to_budget(p, structure, damage=ev.loss_increase)
    c = (
        grow_to_budget(p, small, damage=ev.loss_increase, rounding=ev.rounding)
        if small
        else structure
    )
    if c == structure or not FULL_BUDGET_SHARE * budget_ms <= p.predict(c) <= budget_ms:
        return None
    with run.time_stage("search"):
        book = open_study(
            run.folder.study, run.spec.seed, sampler=run.spec.search.sampler
        )
        effort = SearchEffort(
            trials=0, level_switches=0, workers=who.workers, retries=run.spec.search.retries
        )
        say = lambda what, share: run.on_progress("search", what, share)
        trials = run_study(
            book,
            p,
            executor=who.executor,
            evaluate=who.evaluate,
            starts=[],
            seeds=[("adjusted", c)],
            effort=effort,
            seed=run.spec.seed,
            progress=say,
        )
    return next((t for t in trials if t.candidate.key() == c.key()), None)


def list_plain_starts(run: RunContext, p: SearchProblem) -> list[dict[str, Any]]:
    """A uniform split and one that spares what sees and hears, both with int8 where it is allowed."""
    starts, kinds = [], {n: node.kind for n, node in run.spec.model_nodes().items()}
    for heavy in (False, True):
        point: dict[str, Any] = {}
        for path, d in p.space.dimensions.items():
            if d.choices:
                point[path] = "int8" if "int8" in d.choices else d.choices[0]
            elif path.endswith(".drop"):
                point[path] = 0
            elif path.startswith("nodes."):
                high = d.high or 0.0
                spared = kinds[path.split(".")[1]] in ("image_encoder", "audio_encoder")
                point[path] = min(high, 0.5 if not heavy else 0.2 if spared else 0.7)
            else:
                point[path] = min(max(2.0, d.low or 0.0), d.high or 2.0)
        starts.append(point)
    return starts
