"""The search under a budget: what is searched, who judges, and models of a candidate."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from mmcompress.errors import ClusterError
from mmcompress.measure.predict import Predictor
from mmcompress.records import Candidate, Trial, build_record, to_plain
from mmcompress.search import moves
from mmcompress.search.moves import Predict, SearchProblem
from mmcompress.spec.schema import Spec, apply_overrides
from mmcompress.workflow.state import OnProgress, RunContext, list_precisions

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Sensitivity

K = TypeVar("K", bound=Hashable)
AIMED_SHARE = 0.975
"""The share of the target that structures are searched for."""
EXTRA_TRIALS = 5
"""Proposals and mutations by which the search goes on when a measured miss has moved the budget."""
MAX_SPLITS = 12
"""How many of the knapsack's splits are looked at, the best ones."""
COLLAPSE_RATIO, MIN_DENSE_LOSS = 3.0, 0.05
"""A pipeline is destroyed whose loss before training is more than so many times the dense one; a dense loss below that
counts as that: what is judged by its distance from the dense pipeline would be compared to nothing."""
FULL_BUDGET_SHARE = 0.985
"""A structure that takes less than this share of the budget is given units back until it does not."""


def quality_collapsed(loss: float, dense: float) -> bool:
    """Whether a loss before training says little of what training can make of a structure."""
    return loss > COLLAPSE_RATIO * max(dense, MIN_DENSE_LOSS)


def select_fp32_blocks(ev: Sensitivity, c: Candidate) -> dict[str, tuple[str, ...]]:
    """Blocks of a candidate that stay in fp32, by node."""
    return {n: ev.fp32_blocks.get(n, {}).get(p, ()) for n, p in c.precision.items()}


def build_problem(run: RunContext, ev: Sensitivity, predict: Predictor, budget_ms: float) -> SearchProblem:
    """The search problem: how overrides become a candidate."""
    from mmcompress.prune.allocation import allocate_pipeline
    from mmcompress.registry import ALLOCATIONS

    base = to_plain(run.spec)
    policy = ALLOCATIONS.get(run.spec.prune.allocation)

    def allocated(overrides: dict[str, Any]) -> Candidate:
        return allocate_pipeline(
            build_record(Spec, apply_overrides(base, overrides)),
            run.blocks,
            run.cross_modal,
            ev.curves,
            ev.scores,
            policy,
        )

    def resolve(overrides: dict[str, Any]) -> Candidate:
        c = allocated(overrides)
        return c if p.is_allowed(c) else moves.restore_dropped(p, c, ev.loss_increase)

    fixed, limit = allocated({}), _limit(run, predict, budget_ms)
    free = (list_precisions(run), _choices(run, fixed), _drops(run, fixed))
    p = SearchProblem(run.space, run.blocks, resolve, limit, budget_ms, *free, run.cross_modal, _protection(run))
    most = lambda n, b, options: max(options) if b in run.cross_modal[n] else min(options)
    mildest = {n: {b: most(n, b, options) for b, options in by.items()} for n, by in p.unit_choices.items()}
    if p.protection_excess(Candidate(mildest, fixed.precision)) > 0:  # cuts that the spec itself asks for come first
        p.protection = 0.0
    return p


def _protection(run: RunContext) -> float:
    """What holds for every structure: what the spec fixes (1: nothing), or the least that is searched."""
    searched = run.space.dimensions.get("prune.protection")
    if searched:
        return searched.low or 1.0
    return run.spec.prune.protection if run.spec.prune.protection > 1 else 0.0


def _limit(run: RunContext, predict: Predictor, budget_ms: float) -> Predict:
    """Predicted latency; of what exceeds another limit by more than the budget, the budget exceeded by as much."""
    limits = run.spec.limits
    bounds = [(limits.params_m, lambda c: run.footprint.total_params(c) / 1e6)]
    bounds += [(limits.size_mb, lambda c: run.footprint.size_mb(c))]
    bounds += [(limits.memory_mb, lambda c: run.footprint.memory_mb(c))]
    held = [(bound * AIMED_SHARE, load) for bound, load in bounds if bound is not None]

    def ms(c: Candidate) -> float:
        shares = [load(c) / bound for bound, load in held]
        shares += [predict.node_ms(n, c) / (AIMED_SHARE * limit) for n, limit in limits.node_ms.items()]
        return max([predict(c), *(budget_ms * s for s in shares)])

    return ms if held or limits.node_ms else predict


def find_fastest(p: SearchProblem, predict: Predictor) -> Candidate:
    """The fastest candidate of the space, as predicted: blocks as small as they may be, precisions the faster ones."""
    precision = {n: options[0] for n, options in p.precisions.items()}
    kept = {n: {b: min(options) for b, options in by.items()} for n, by in p.unit_choices.items()}
    cost = lambda n, b, k: predict(Candidate({**kept, n: {**kept[n], b: k}}, precision))
    kept = moves.restore_dropped(p, Candidate(kept, precision), cost).kept_units  # those come back that cost least
    for n, options in p.precisions.items():
        precision[n] = min(options, key=lambda o, n=n: predict(Candidate(kept, {**precision, n: o})))  # type: ignore[misc]
    return Candidate(kept, precision)


def _choices(run: RunContext, fixed: Candidate) -> dict[str, dict[str, tuple[int, ...]]]:
    """Kept counts each block may have: one where the spec fixes it, else what the space's ratio and drop allow."""
    from mmcompress.prune.allocation import count_steps, units_after

    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for n, blocks in run.blocks.items():
        found[n] = {}
        drop = run.space.dimensions.get(f"nodes.{n}.prune.drop")
        for b in blocks:
            ratio = run.space.dimensions.get(f"nodes.{n}.prune.{b.group}")
            gone = drop is None and fixed.kept_units[n][b.name] == 0  # the spec says how many are
            if ratio is None or gone or b.name in run.spec.nodes[n].prune.blocks:
                found[n][b.name] = (fixed.kept_units[n][b.name],)
                continue
            low, high = ((x or 0.0) * count_steps(b) for x in (ratio.low, ratio.high))
            cuts = range(math.ceil(low - 1e-9), int(high + 1e-9) + 1) or (round(low),)  # no step between: the nearest
            options = {int(units_after(b, c)) for c in cuts} | (
                {0} if b.drop and drop and (drop.high or 0) >= 1 else set()
            )
            found[n][b.name] = tuple(sorted(options))
    return found


def _drops(run: RunContext, fixed: Candidate) -> dict[str, int]:
    """How many blocks of each node may be gone whole: what the space allows, or the spec asks for."""
    found = {}
    for n in run.blocks:
        drop = run.space.dimensions.get(f"nodes.{n}.prune.drop")
        asked = sum(k == 0 for k in fixed.kept_units[n].values())
        found[n] = max(asked, int(drop.high or 0) if drop else 0)
    return found


@dataclass(frozen=True)
class TrialEvaluator:
    """Who judges trials: the function, where it runs, and how many at once. Workers are started once a run."""

    evaluate: Any
    executor: Any
    workers: int
    evaluate_again: Any = None
    """The same on more pairs, for the best few; None where there are no more."""
    share: float = 0.0
    """Of all pairs behind a final loss, those that every trial is judged on."""
    retries: int = 0
    """How often what failed is tried again."""
    final_losses: dict[str, float] = field(default_factory=dict)
    """Losses of finalists by candidate."""

    def evaluate_all(self, judge: Any, asked: Mapping[K, Candidate], say: OnProgress, what: str) -> dict[K, float]:
        """The loss of each, infinite where it could not be judged: as with a trial that fails the search goes on.

        Raises `ClusterError` when a worker is gone.
        """
        found: dict[K, float] = {}
        try:
            waiting = {key: self.executor.submit(judge, to_plain(c)) for key, c in asked.items()}
            for i, key in enumerate(asked):
                say("search", what, i / len(asked))
                for tries in range(self.retries, -1, -1):
                    try:
                        found[key] = float(waiting[key].result()["loss"])
                        break
                    except BrokenExecutor:
                        raise
                    except Exception as e:
                        if tries:
                            waiting[key] = self.executor.submit(judge, to_plain(asked[key]))
                            continue
                        say("search", f"a structure could not be judged: {type(e).__name__}: {e}", None)
                        found[key] = math.inf
        except BrokenExecutor as e:
            raise ClusterError("a worker process died (out of memory?); finished trials are kept: use --resume") from e
        return {key: loss if math.isfinite(loss) else math.inf for key, loss in found.items()}


@contextmanager
def start_evaluator(run: RunContext, ev: Sensitivity) -> Iterator[TrialEvaluator]:
    """Start the workers of the search, with all that a trial needs; stop them at the end."""
    from mmcompress.prune.trial import (
        estimate_candidate,
        evaluate_candidate,
        evaluate_on_more_pairs,
        make_estimate_context,
        make_worker_context,
    )
    from mmcompress.registry import EXECUTORS

    s, again, share = run.spec.search, None, 0.0
    with run.time_stage("search"):
        if s.evaluator == "estimated":
            judge, context = estimate_candidate, make_estimate_context(ev.curves, ev.rounding, ev.base_loss)
        else:
            batch, more = _choosing(run)
            if more is not None:
                again, share = evaluate_on_more_pairs, len(batch) / (len(batch) + len(more))
            threads = run.spec.measure.threads if s.executor == "inline" else 1
            given = (ev.scores, ev.grams, batch, more, uuid4().hex, threads, ev.fp32_blocks)
            judge, context = evaluate_candidate, make_worker_context(run.spec, *given)
        executor = EXECUTORS.get(s.executor)(context, s.workers, s.ray_address)
    try:
        yield TrialEvaluator(judge, executor, getattr(executor, "workers", s.workers), again, share, s.retries)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _choosing(run: RunContext) -> tuple[Any, Any]:
    """(pairs that every trial is judged on, further ones for finalists or None)."""
    d = run.spec.data
    every = run.pipeline.collate(run.data.load("val", d.validation_pairs * d.final_pairs_factor))
    few = every[slice(0, d.validation_pairs)]
    rest = (len(every) - len(few)) // len(few) * len(few)
    return few, every[slice(len(few), len(few) + rest)] if rest else None


def choose_trial(run: RunContext, who: TrialEvaluator, trials: Sequence[Trial], budget_ms: float) -> Trial | None:
    """The trial within the budget that stands best on all pairs, with that loss: the first few are judged on more.

    Those that leave some of the budget unused are passed over: what was grown out of them is there. Where none is
    within the budget, the fastest. Raises `ClusterError` when a worker is gone.
    """
    within = _finalists(run, trials, budget_ms, FULL_BUDGET_SHARE) or _finalists(run, trials, budget_ms)
    if not within:
        return min(trials, key=lambda t: t.latency_ms, default=None)
    if who.evaluate_again is None or len(within) == 1:
        return within[0]
    with run.time_stage("search"):
        new = {t.candidate.key(): t.candidate for t in within if t.candidate.key() not in who.final_losses}
        who.final_losses.update(
            who.evaluate_all(who.evaluate_again, new, run.on_progress, f"the best {len(within)} on more pairs")
        )
    whole = [
        replace(t, loss=who.share * t.loss + (1 - who.share) * who.final_losses[t.candidate.key()]) for t in within
    ]
    return min(whole, key=lambda t: t.loss)


def _finalists(run: RunContext, trials: Sequence[Trial], budget_ms: float, least: float = 0.0) -> list[Trial]:
    """The best few that take at most the budget, and at least a share of it."""
    within = (t for t in trials if least * budget_ms <= t.latency_ms <= budget_ms)
    return sorted(within, key=lambda t: t.loss)[: run.spec.search.finalists]


def run_search(
    run: RunContext,
    ev: Sensitivity,
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
    from mmcompress.search import study

    p = build_problem(run, ev, predict, budget_ms)
    with run.time_stage("search"):
        book = study.open_study(run.folder / "study.journal", run.spec.seed, run.spec.search.sampler)
        led = blind is None
        best = (
            list(known) or [c for _, c in split_budget(run, ev, predict, budget_ms * moves.BUDGET_SHARE, p)[:4]]
            if led
            else []
        )
        best = best if best or not led else [find_fastest(p, predict)]
        starts = [moves.to_search_point(p, c) for c in best[:3]] + (list_plain_starts(run, p) if led else [])
        seeds = [("knapsack", c) for c in best]
        if attempt and led:  # the best direction so far, to be scaled to the corrected budget
            judged = sorted(study.finished_trials(book), key=lambda t: t.loss)[:6]
            starts = [moves.to_search_point(p, t.candidate) for t in judged[:2]]
            cut = [c for t in judged if (c := moves.cut_to_budget(p, t.candidate, ev.loss_increase))]
            seeds = [("trimmed", c) for c in cut] + (seeds if known else seeds[:1])
        s = run.spec.search
        more = study.SearchEffort(
            s.trials + EXTRA_TRIALS * attempt, s.level_switches + EXTRA_TRIALS * attempt, who.workers, s.retries
        )
        if blind is not None:  # as many as the others can come to, with seeds and what is grown
            seeded = (1 + attempt) * (s.finalists + len(run.blocks)) + 5 + 11 * attempt + blind
            more = replace(more, trials=more.trials + more.level_switches + seeded, level_switches=0)
        say = lambda what, share: run.on_progress("search", what, share)
        trials = study.run_study(book, p, who.executor, who.evaluate, starts, seeds, more, run.spec.seed, say)
        held = lambda found: [t for t in found if p.is_allowed(t.candidate)] or found  # of an older journal
        if not led:
            return held(trials)
        wanting = [
            t.candidate for t in _finalists(run, trials, budget_ms) if t.latency_ms < FULL_BUDGET_SHARE * budget_ms
        ]
        grown = [("filled", moves.grow_to_budget(p, c, ev.loss_increase, ev.rounding)) for c in wanting]
        small = [c for _, c in grown if p.predict(c) < FULL_BUDGET_SHARE * budget_ms]  # the next step up is too large
        grown += [
            ("exchanged", c)
            for c in (moves.trade_for_precision(p, small[0], ev.loss_increase, ev.rounding) if small else ())
        ]
        if grown:
            trials = study.run_study(book, p, who.executor, who.evaluate, [], grown, more, run.spec.seed, say)
        return held(trials)


def adjust_structure(
    run: RunContext, ev: Sensitivity, predict: Predictor, budget_ms: float, who: TrialEvaluator, structure: Candidate
) -> Trial | None:
    """A structure fitted to a budget that has moved a little, judged; None where no unit is small enough for that.

    Of many structures the search finds those that the predictor underrates (the winner's curse); of this one it is
    known by how much.
    """
    from mmcompress.search import study

    p = replace(
        build_problem(run, ev, predict, budget_ms), precisions={}
    )  # in another precision it is another structure
    small = moves.cut_to_budget(p, structure, ev.loss_increase)
    c = moves.grow_to_budget(p, small, ev.loss_increase, ev.rounding) if small else structure
    if c == structure or not FULL_BUDGET_SHARE * budget_ms <= p.predict(c) <= budget_ms:
        return None
    with run.time_stage("search"):
        book = study.open_study(run.folder / "study.journal", run.spec.seed, run.spec.search.sampler)
        effort = study.SearchEffort(0, 0, who.workers, run.spec.search.retries)
        say = lambda what, share: run.on_progress("search", what, share)
        trials = study.run_study(book, p, who.executor, who.evaluate, [], [("adjusted", c)], effort, run.spec.seed, say)
    return next((t for t in trials if t.candidate.key() == c.key()), None)


def split_budget(
    run: RunContext, ev: Sensitivity, predict: Predictor, budget_ms: float, p: SearchProblem, nodes: Sequence[str] = ()
) -> list[tuple[float, Candidate]]:
    """The knapsack's splits of a budget over some of the nodes (default: all), least estimated damage first.

    It adds up what the nodes take. Where branches run in parallel it is given more than the budget, as much as leaves
    the critical path within.
    """
    from mmcompress.search.knapsack import split_by_knapsack

    part = lambda by: {n: by[n] for n in nodes or run.blocks}
    given = (part(run.blocks), part(run.cross_modal), part(ev.curves), replace(predict, reads={}))
    rest = (run.spec.prune.protection, part(p.precisions), part(ev.rounding), part(p.unit_choices))

    def solved(ms: float) -> list[tuple[float, Candidate]]:
        rows = split_by_knapsack(*given, ms, *rest)
        if nodes:  # of a part of the pipeline the rest is not known
            return rows
        held: list[tuple[float, Candidate]] = []
        for damage, c in rows:  # what is mended does no less harm: those behind are worse
            if p.is_allowed(c):
                held.append((damage, c))
            elif mended := moves.cut_to_budget(p, moves.restore_dropped(p, c, ev.loss_increase), ev.loss_increase):
                held.append((estimated(mended), mended))
            if len(held) == MAX_SPLITS:
                break
        return sorted(held, key=lambda f: f[0])

    def estimated(c: Candidate) -> float:
        weight = lambda n, b: run.spec.prune.protection if b in run.cross_modal[n] else 1.0
        cuts = sum(weight(n, b) * ev.loss_increase(n, b, k) for n, by in c.kept_units.items() for b, k in by.items())
        return cuts + sum(ev.rounding[n][of] for n, of in c.precision.items())

    found = solved(budget_ms)
    low, high = 1.0, float(len(run.blocks)) if predict.reads and not nodes else 1.0
    for _ in range(6 if high > low else 0):
        middle = (low + high) / 2
        within = [f for f in solved(middle * budget_ms) if predict(f[1]) <= budget_ms]
        low, high = (middle, high) if within else (low, middle)
        found = within or found
    return found


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


def build_pruned_models(
    run: RunContext, ev: Sensitivity, candidate: Candidate, refit: bool, dense: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fresh pruned models of a candidate, refitted in order on calibration pairs when asked.

    `dense`: the models to cut, those of the run by default.
    """
    from mmcompress.models.sources import set_context_lengths
    from mmcompress.prune.refit import refit_
    from mmcompress.prune.trial import prune_node

    dense = dense or run.models
    models = {n: prune_node(m, candidate.kept_units[n], ev.scores[n], None, 0.0) for n, m in dense.items()}
    set_context_lengths(run.spec, models)
    if refit:
        batch = run.pipeline.collate(run.data.load("train", run.spec.data.calibration))
        refit_(run.pipeline, models, dense, batch, run.spec.prune.ridge)
    return models
