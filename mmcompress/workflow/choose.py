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
from mmcompress.records import Candidate, Trial, build, plain
from mmcompress.search import moves
from mmcompress.search.moves import Predict, Problem
from mmcompress.spec.schema import Spec, overridden
from mmcompress.workflow.state import Run, Say, precisions_of

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

K = TypeVar("K", bound=Hashable)
AIM = 0.975
"""The share of the target that structures are searched for."""
MORE = 5
"""Proposals and mutations by which the search goes on when a measured miss has moved the budget."""
SPLITS = 12
"""How many of the knapsack's splits are looked at, the best ones."""
STEEP, SMALL = 3.0, 0.05
"""A pipeline is destroyed whose loss before training is more than so many times the dense one; a dense loss below that
counts as that: what is judged by its distance from the dense pipeline would be compared to nothing."""
FULL = 0.985
"""A structure that takes less than this share of the budget is given units back until it does not."""


def destroyed(loss: float, dense: float) -> bool:
    """Whether a loss before training says little of what training can make of a structure."""
    return loss > STEEP * max(dense, SMALL)


def spared(ev: Evidence, c: Candidate) -> dict[str, tuple[str, ...]]:
    """Blocks of a candidate that stay in fp32, by node."""
    return {n: ev.spared.get(n, {}).get(p, ()) for n, p in c.precision.items()}


def problem(run: Run, ev: Evidence, predict: Predictor, budget_ms: float) -> Problem:
    """The search problem: how overrides become a candidate."""
    from mmcompress.prune.allocation import allocate
    from mmcompress.registry import ALLOCATION

    base = plain(run.spec)
    policy = ALLOCATION.get(run.spec.prune.allocation)

    def allocated(overrides: dict[str, Any]) -> Candidate:
        return allocate(build(Spec, overridden(base, overrides)), run.blocks, run.cross, ev.curves, ev.scores, policy)

    def resolve(overrides: dict[str, Any]) -> Candidate:
        c = allocated(overrides)
        return c if p.allows(c) else moves.revive(p, c, ev.damage)

    fixed, limit = allocated({}), _limit(run, predict, budget_ms)
    free = (precisions_of(run), _choices(run, fixed), _drops(run, fixed))
    p = Problem(run.space, run.blocks, resolve, limit, budget_ms, *free, run.cross, _protection(run))
    most = lambda n, b, options: max(options) if b in run.cross[n] else min(options)
    mildest = {n: {b: most(n, b, options) for b, options in by.items()} for n, by in p.choices.items()}
    if p.excess(Candidate(mildest, fixed.precision)) > 0:  # cuts that the spec itself asks for come first
        p.protection = 0.0
    return p


def _protection(run: Run) -> float:
    """What holds for every structure: what the spec fixes (1: nothing), or the least that is searched."""
    searched = run.space.dimensions.get("prune.protection")
    if searched:
        return searched.low or 1.0
    return run.spec.prune.protection if run.spec.prune.protection > 1 else 0.0


def _limit(run: Run, predict: Predictor, budget_ms: float) -> Predict:
    """Predicted latency; of what exceeds another limit by more than the budget, the budget exceeded by as much."""
    limits = run.spec.limits
    bounds = [(limits.params_m, lambda c: run.footprint.total_params(c) / 1e6)]
    bounds += [(limits.size_mb, lambda c: run.footprint.size_mb(c))]
    bounds += [(limits.memory_mb, lambda c: run.footprint.memory_mb(c))]
    held = [(bound * AIM, load) for bound, load in bounds if bound is not None]

    def ms(c: Candidate) -> float:
        shares = [load(c) / bound for bound, load in held]
        shares += [predict.node_ms(n, c) / (AIM * limit) for n, limit in limits.node_ms.items()]
        return max([predict(c), *(budget_ms * s for s in shares)])

    return ms if held or limits.node_ms else predict


def floor(p: Problem, predict: Predictor) -> Candidate:
    """The fastest candidate of the space, as predicted: blocks as small as they may be, precisions the faster ones."""
    precision = {n: options[0] for n, options in p.precisions.items()}
    kept = {n: {b: min(options) for b, options in by.items()} for n, by in p.choices.items()}
    cost = lambda n, b, k: predict(Candidate({**kept, n: {**kept[n], b: k}}, precision))
    kept = moves.revive(p, Candidate(kept, precision), cost).kept  # those come back that cost least
    for n, options in p.precisions.items():
        precision[n] = min(options, key=lambda o, n=n: predict(Candidate(kept, {**precision, n: o})))  # type: ignore[misc]
    return Candidate(kept, precision)


def _choices(run: Run, fixed: Candidate) -> dict[str, dict[str, tuple[int, ...]]]:
    """Kept counts each block may have: one where the spec fixes it, else what the space's ratio and drop allow."""
    from mmcompress.prune.allocation import after, steps

    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for n, blocks in run.blocks.items():
        found[n] = {}
        drop = run.space.dimensions.get(f"nodes.{n}.prune.drop")
        for b in blocks:
            ratio = run.space.dimensions.get(f"nodes.{n}.prune.{b.group}")
            gone = drop is None and fixed.kept[n][b.name] == 0  # the spec says how many are
            if ratio is None or gone or b.name in run.spec.nodes[n].prune.blocks:
                found[n][b.name] = (fixed.kept[n][b.name],)
                continue
            low, high = ((x or 0.0) * steps(b) for x in (ratio.low, ratio.high))
            cuts = range(math.ceil(low - 1e-9), int(high + 1e-9) + 1) or (round(low),)  # no step between: the nearest
            options = {int(after(b, c)) for c in cuts} | ({0} if b.drop and drop and (drop.high or 0) >= 1 else set())
            found[n][b.name] = tuple(sorted(options))
    return found


def _drops(run: Run, fixed: Candidate) -> dict[str, int]:
    """How many blocks of each node may be gone whole: what the space allows, or the spec asks for."""
    found = {}
    for n in run.blocks:
        drop = run.space.dimensions.get(f"nodes.{n}.prune.drop")
        asked = sum(k == 0 for k in fixed.kept[n].values())
        found[n] = max(asked, int(drop.high or 0) if drop else 0)
    return found


@dataclass(frozen=True)
class Jury:
    """Who judges trials: the function, where it runs, and how many at once. Workers are started once a run."""

    judge: Any
    executor: Any
    workers: int
    again: Any = None
    """The same on more pairs, for the best few; None where there are no more."""
    share: float = 0.0
    """Of all pairs behind a final loss, those that every trial is judged on."""
    retries: int = 0
    """How often what failed is tried again."""
    final: dict[str, float] = field(default_factory=dict)
    """Losses of finalists by candidate."""

    def losses(self, judge: Any, asked: Mapping[K, Candidate], say: Say, what: str) -> dict[K, float]:
        """The loss of each, infinite where it could not be judged: as with a trial that fails the search goes on.

        Raises `ClusterError` when a worker is gone.
        """
        found: dict[K, float] = {}
        try:
            waiting = {key: self.executor.submit(judge, plain(c)) for key, c in asked.items()}
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
                            waiting[key] = self.executor.submit(judge, plain(asked[key]))
                            continue
                        say("search", f"a structure could not be judged: {type(e).__name__}: {e}", None)
                        found[key] = math.inf
        except BrokenExecutor as e:
            raise ClusterError("a worker process died (out of memory?); finished trials are kept: use --resume") from e
        return {key: loss if math.isfinite(loss) else math.inf for key, loss in found.items()}


@contextmanager
def jury(run: Run, ev: Evidence) -> Iterator[Jury]:
    """Start the workers of the search, with all that a trial needs; stop them at the end."""
    from mmcompress.prune.trial import estimate, evaluate, evaluate_again, pack, pack_estimate
    from mmcompress.registry import EXECUTORS

    s, again, share = run.spec.search, None, 0.0
    with run.timed("search"):
        if s.judge == "estimated":
            judge, context = estimate, pack_estimate(ev.curves, ev.rounding, ev.base_loss)
        else:
            batch, more = _choosing(run)
            if more is not None:
                again, share = evaluate_again, len(batch) / (len(batch) + len(more))
            threads = run.spec.measure.threads if s.executor == "inline" else 1
            given = (ev.scores, ev.grams, batch, more, uuid4().hex, threads, ev.spared)
            judge, context = evaluate, pack(run.spec, *given)
        executor = EXECUTORS.get(s.executor)(context, s.workers, s.ray_address)
    try:
        yield Jury(judge, executor, getattr(executor, "workers", s.workers), again, share, s.retries)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _choosing(run: Run) -> tuple[Any, Any]:
    """(pairs that every trial is judged on, further ones for finalists or None)."""
    d = run.spec.data
    every = run.pipeline.batch(run.data.load("val", d.choosing * d.finals))
    few = every[slice(0, d.choosing)]
    rest = (len(every) - len(few)) // len(few) * len(few)
    return few, every[slice(len(few), len(few) + rest)] if rest else None


def chosen(run: Run, who: Jury, trials: Sequence[Trial], budget_ms: float) -> Trial | None:
    """The trial within the budget that stands best on all pairs, with that loss: the first few are judged on more.

    Those that leave some of the budget unused are passed over: what was grown out of them is there. Where none is
    within the budget, the fastest. Raises `ClusterError` when a worker is gone.
    """
    within = _finalists(run, trials, budget_ms, FULL) or _finalists(run, trials, budget_ms)
    if not within:
        return min(trials, key=lambda t: t.latency_ms, default=None)
    if who.again is None or len(within) == 1:
        return within[0]
    with run.timed("search"):
        new = {t.candidate.key(): t.candidate for t in within if t.candidate.key() not in who.final}
        who.final.update(who.losses(who.again, new, run.say, f"the best {len(within)} on more pairs"))
    whole = [replace(t, loss=who.share * t.loss + (1 - who.share) * who.final[t.candidate.key()]) for t in within]
    return min(whole, key=lambda t: t.loss)


def _finalists(run: Run, trials: Sequence[Trial], budget_ms: float, least: float = 0.0) -> list[Trial]:
    """The best few that take at most the budget, and at least a share of it."""
    within = (t for t in trials if least * budget_ms <= t.latency_ms <= budget_ms)
    return sorted(within, key=lambda t: t.loss)[: run.spec.search.finalists]


def search(
    run: Run,
    ev: Evidence,
    predict: Predictor,
    budget_ms: float,
    who: Jury,
    attempt: int = 0,
    known: Sequence[Candidate] = (),
    blind: int | None = None,
) -> list[Trial]:
    """Run (or go on with) the study of this run folder, from the structures that are `known` to be good.

    `blind`: without a head start, and with so many more trials in its place.
    """
    from mmcompress.search import study

    p = problem(run, ev, predict, budget_ms)
    with run.timed("search"):
        book = study.open_study(run.folder / "study.journal", run.spec.seed, run.spec.search.sampler)
        led = blind is None
        best = list(known) or [c for _, c in splits(run, ev, predict, budget_ms * moves.MARGIN, p)[:4]] if led else []
        best = best if best or not led else [floor(p, predict)]
        starts = [moves.implied(p, c) for c in best[:3]] + (plain_starts(run, p) if led else [])
        seeds = [("knapsack", c) for c in best]
        if attempt and led:  # the best direction so far, to be scaled to the corrected budget
            judged = sorted(study.finished(book), key=lambda t: t.loss)[:6]
            starts = [moves.implied(p, t.candidate) for t in judged[:2]]
            cut = [c for t in judged if (c := moves.trim(p, t.candidate, ev.damage))]
            seeds = [("trimmed", c) for c in cut] + (seeds if known else seeds[:1])
        s = run.spec.search
        more = study.Effort(s.trials + MORE * attempt, s.mutations + MORE * attempt, who.workers, s.retries)
        if blind is not None:  # as many as the others can come to, with seeds and what is grown
            seeded = (1 + attempt) * (s.finalists + len(run.blocks)) + 5 + 11 * attempt + blind
            more = replace(more, trials=more.trials + more.mutations + seeded, mutations=0)
        say = lambda what, share: run.say("search", what, share)
        trials = study.run(book, p, who.executor, who.judge, starts, seeds, more, run.spec.seed, say)
        held = lambda found: [t for t in found if p.allows(t.candidate)] or found  # of an older journal
        if not led:
            return held(trials)
        wanting = [t.candidate for t in _finalists(run, trials, budget_ms) if t.latency_ms < FULL * budget_ms]
        grown = [("filled", moves.fill(p, c, ev.damage, ev.rounding)) for c in wanting]
        small = [c for _, c in grown if p.predict(c) < FULL * budget_ms]  # the next step up is too large
        grown += [("exchanged", c) for c in (moves.exchange(p, small[0], ev.damage, ev.rounding) if small else ())]
        if grown:
            trials = study.run(book, p, who.executor, who.judge, [], grown, more, run.spec.seed, say)
        return held(trials)


def adjusted(
    run: Run, ev: Evidence, predict: Predictor, budget_ms: float, who: Jury, structure: Candidate
) -> Trial | None:
    """A structure fitted to a budget that has moved a little, judged; None where no unit is small enough for that.

    Of many structures the search finds those that the predictor underrates (the winner's curse); of this one it is
    known by how much.
    """
    from mmcompress.search import study

    p = replace(problem(run, ev, predict, budget_ms), precisions={})  # in another precision it is another structure
    small = moves.trim(p, structure, ev.damage)
    c = moves.fill(p, small, ev.damage, ev.rounding) if small else structure
    if c == structure or not FULL * budget_ms <= p.predict(c) <= budget_ms:
        return None
    with run.timed("search"):
        book = study.open_study(run.folder / "study.journal", run.spec.seed, run.spec.search.sampler)
        effort = study.Effort(0, 0, who.workers, run.spec.search.retries)
        say = lambda what, share: run.say("search", what, share)
        trials = study.run(book, p, who.executor, who.judge, [], [("adjusted", c)], effort, run.spec.seed, say)
    return next((t for t in trials if t.candidate.key() == c.key()), None)


def splits(
    run: Run, ev: Evidence, predict: Predictor, budget_ms: float, p: Problem, nodes: Sequence[str] = ()
) -> list[tuple[float, Candidate]]:
    """The knapsack's splits of a budget over some of the nodes (default: all), least estimated damage first.

    It adds up what the nodes take. Where branches run in parallel it is given more than the budget, as much as leaves
    the critical path within.
    """
    from mmcompress.search.knapsack import candidates

    part = lambda by: {n: by[n] for n in nodes or run.blocks}
    given = (part(run.blocks), part(run.cross), part(ev.curves), replace(predict, reads={}))
    rest = (run.spec.prune.protection, part(p.precisions), part(ev.rounding), part(p.choices))

    def solved(ms: float) -> list[tuple[float, Candidate]]:
        rows = candidates(*given, ms, *rest)
        if nodes:  # of a part of the pipeline the rest is not known
            return rows
        held: list[tuple[float, Candidate]] = []
        for damage, c in rows:  # what is mended does no less harm: those behind are worse
            if p.allows(c):
                held.append((damage, c))
            elif mended := moves.trim(p, moves.revive(p, c, ev.damage), ev.damage):
                held.append((estimated(mended), mended))
            if len(held) == SPLITS:
                break
        return sorted(held, key=lambda f: f[0])

    def estimated(c: Candidate) -> float:
        weight = lambda n, b: run.spec.prune.protection if b in run.cross[n] else 1.0
        cuts = sum(weight(n, b) * ev.damage(n, b, k) for n, by in c.kept.items() for b, k in by.items())
        return cuts + sum(ev.rounding[n][of] for n, of in c.precision.items())

    found = solved(budget_ms)
    low, high = 1.0, float(len(run.blocks)) if predict.reads and not nodes else 1.0
    for _ in range(6 if high > low else 0):
        middle = (low + high) / 2
        within = [f for f in solved(middle * budget_ms) if predict(f[1]) <= budget_ms]
        low, high = (middle, high) if within else (low, middle)
        found = within or found
    return found


def plain_starts(run: Run, p: Problem) -> list[dict[str, Any]]:
    """A uniform split and one that spares what sees and hears, both with int8 where it is allowed."""
    starts, kinds = [], {n: node.kind for n, node in run.spec.models().items()}
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


def pruned(
    run: Run, ev: Evidence, candidate: Candidate, refit: bool, dense: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fresh pruned models of a candidate, refitted in order on calibration pairs when asked.

    `dense`: the models to cut, those of the run by default.
    """
    from mmcompress.models.sources import connect
    from mmcompress.prune.refit import refit_
    from mmcompress.prune.trial import prune_node

    dense = dense or run.models
    models = {n: prune_node(m, candidate.kept[n], ev.scores[n], None, 0.0) for n, m in dense.items()}
    connect(run.spec, models)
    if refit:
        batch = run.pipeline.batch(run.data.load("train", run.spec.data.calibration))
        refit_(run.pipeline, models, dense, batch, run.spec.prune.ridge)
    return models
