"""Stage: search under the budget, then measure the chosen structure before anything is trained."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mmcompress.errors import DataError
from mmcompress.records import Candidate, Trial, build, plain, read, write
from mmcompress.spec.loader import parse_target
from mmcompress.spec.schema import Spec, keys_of
from mmcompress.workflow.dense import Profile
from mmcompress.workflow.state import Run, budget

AIM = 0.98
"""The share of the target that structures are searched for; what measures up to `SLACK` more is accepted."""
SLACK = 0.01
ENOUGH = 0.9
"""Below this share of the target more was cut than needed: once, the search goes on with the corrected prediction."""
ATTEMPTS = 4


def problem(run: Run, ev: Any, predict: Any, budget_ms: float) -> Any:
    """The search problem: how overrides become a candidate."""
    from mmcompress.prune.allocation import allocate
    from mmcompress.registry import ALLOCATION
    from mmcompress.search.moves import Problem

    base = plain(run.spec)
    policy = ALLOCATION.get(run.spec.prune.allocation)

    def resolve(overrides: dict[str, Any]) -> Candidate:
        data = _override(base, overrides)
        return allocate(build(Spec, data), run.blocks, run.cross, ev.curves, ev.scores, policy)

    fixed, precisions = resolve({}), {}
    for n in run.models:
        d = run.space.dimensions.get(f"nodes.{n}.precision")
        precisions[n] = tuple(d.choices) if d else (fixed.precision[n],)
    return Problem(run.space, run.blocks, resolve, predict, budget_ms, precisions, _choices(run, fixed))


def _choices(run: Run, fixed: Candidate) -> dict[str, dict[str, tuple[int, ...]]]:
    """Kept counts each block may have: one where the spec fixes it, else what the space's ratio and drop allow."""
    from mmcompress.prune.allocation import after, steps

    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for n, blocks in run.blocks.items():
        found[n] = {}
        drop = run.space.dimensions.get(f"nodes.{n}.prune.drop")
        for b in blocks:
            ratio = run.space.dimensions.get(f"nodes.{n}.prune.{b.group}")
            if ratio is None or b.name in run.spec.nodes[n].prune.blocks:
                found[n][b.name] = (fixed.kept[n][b.name],)
                continue
            cuts = range(int((ratio.high or 0.0) * steps(b)) + 1)
            options = {int(after(b, c)) for c in cuts} | ({0} if b.drop and drop and (drop.high or 0) >= 1 else set())
            found[n][b.name] = tuple(sorted(options))
    return found


def _override(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    data = json.loads(json.dumps(base))
    for dotted, value in overrides.items():
        keys = keys_of(dotted)
        at = data
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = value
    return data


@dataclass(frozen=True)
class Jury:
    """Who judges trials: the function, where it runs, and how many at once. Workers are started once a run."""

    judge: Any
    executor: Any
    workers: int


@contextmanager
def jury(run: Run, ev: Any) -> Iterator[Jury]:
    """Start the workers of the search, with all that a trial needs; stop them at the end."""
    from mmcompress.prune.trial import estimate, evaluate, pack, pack_estimate
    from mmcompress.registry import EXECUTORS

    s = run.spec.search
    with run.timed("search"):
        if s.judge == "estimated":
            judge, context = estimate, pack_estimate(ev.curves, ev.int8_damage, ev.base_loss)
        else:
            batch = run.pipeline.batch(run.data.load("val", run.spec.data.choosing))
            threads = run.spec.measure.threads if s.executor == "inline" else 1
            key = f"{run.folder.resolve()}:{run.spec.seed}"
            judge, context = evaluate, pack(run.spec, ev.scores, ev.grams, batch, key, threads)
        executor = EXECUTORS.get(s.executor)(context, s.workers, s.ray_address)
    try:
        yield Jury(judge, executor, 1 if s.executor == "inline" else s.workers)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def search(run: Run, ev: Any, predict: Any, budget_ms: float, who: Jury, attempt: int = 0) -> list[Trial]:
    """Run (or go on with) the study of this run folder."""
    from mmcompress.search import knapsack, moves, study

    p = problem(run, ev, predict, budget_ms)
    with run.timed("search"):
        book = study.open_study(run.folder / "study.journal", run.spec.seed)
        splits = knapsack.candidates(
            run.blocks,
            run.cross,
            ev.curves,
            predict,
            budget_ms * 0.995,
            run.spec.prune.protection,
            p.precisions,
            ev.int8_damage,
            p.choices,
        )
        seeds = [c for _, c in splits[:4]]
        if attempt == 0:
            starts = [moves.implied(p, c) for c in seeds[:3]] + _plain_starts(p)
        else:  # the best direction so far, to be scaled to the corrected budget
            known = sorted(study.finished(book), key=lambda t: t.loss)[:6]
            starts = [moves.implied(p, t.candidate) for t in known[:2]]
            damage = lambda n, b, k: float(ev.curves[n][b].at(k))
            seeds = [c for t in known if (c := moves.trim(p, t.candidate, damage))] + seeds[:1]
        s = run.spec.search
        more = study.Effort(s.trials + 10 * attempt, s.mutations + 8 * attempt, who.workers, s.retries)
        say = lambda what, share: run.say("search", what, share)
        return study.run(book, p, who.executor, who.judge, starts, seeds, more, run.spec.seed, say)


def _plain_starts(p: Any) -> list[dict[str, Any]]:
    """A uniform split and a text-heavy one, both with int8 where it is allowed."""
    starts = []
    for heavy in (False, True):
        point: dict[str, Any] = {}
        for path, d in p.space.dimensions.items():
            if d.choices:
                point[path] = "int8" if "int8" in d.choices else d.choices[0]
            elif path.endswith(".drop"):
                point[path] = 0
            elif path.startswith("nodes."):
                high = d.high or 0.0
                point[path] = min(high, 0.5 if not heavy else 0.2 if path.split(".")[1].startswith("v") else 0.7)
            else:
                point[path] = min(max(2.0, d.low or 0.0), d.high or 2.0)
        starts.append(point)
    return starts


def pruned(run: Run, ev: Any, candidate: Candidate, refit: bool) -> dict[str, Any]:
    """Fresh pruned models of a candidate, refitted in order on calibration pairs when asked."""
    from mmcompress.prune.refit import refit_
    from mmcompress.prune.trial import prune_node

    models = {n: prune_node(m, candidate.kept[n], ev.scores[n], None, 0.0) for n, m in run.models.items()}
    if refit:
        batch = run.pipeline.batch(run.data.load("train", run.spec.data.calibration))
        refit_(run.pipeline, models, run.models, batch, run.spec.prune.ridge)
    return models


@dataclass(frozen=True)
class Fitted:
    """The structure that will be distilled, with what was predicted and measured of it."""

    candidate: Candidate
    predicted_ms: float
    measured_ms: float
    target_ms: float
    asked: int
    """Trials and mutations of the search behind it: a resumed run that asks for more searches again."""
    correction: float
    """Measured over predicted latency, as fed back to the predictor."""
    attempts: tuple[dict[str, float], ...] = ()


def fit(run: Run, ev: Any, predict: Any, dense: Profile) -> Fitted:
    """Search, then measure the best structure before anything is trained; a miss corrects the prediction.

    Latency does not depend on the weights, so no time is lost on distilling what would miss the target.
    """
    from mmcompress.search.moves import best

    record = run.folder / "fitted.json"
    asked = run.spec.search.trials + run.spec.search.mutations
    if record.exists():
        found = read(Fitted, record)
        if found.asked >= asked:
            return found
        record.unlink()
        shutil.rmtree(run.folder / "weights", ignore_errors=True)
    attempts: list[dict[str, float]] = []
    measured_trials: list[tuple[float, Trial]] = []
    residuals: list[float] = []
    target_ms = budget(run.spec, dense.latency_ms.p50)
    relative = parse_target(run.spec.target)[0] == "speedup"
    with jury(run, ev) as who:
        for attempt in range(ATTEMPTS):
            trials = search(run, ev, predict, target_ms * AIM, who, attempt)
            top = best(trials, target_ms * AIM)
            chosen = top or min(trials, key=lambda t: t.latency_ms, default=None)
            if chosen is None or any(chosen.candidate == t.candidate for _, t in measured_trials):
                break
            with run.timed("fit"):
                run.say("fit", f"measuring the best structure (predicted {chosen.latency_ms:.2f} ms)", None)
                measured, share = _measure_structure(run, ev, chosen.candidate)
            if relative:  # a machine that is slower now is slower for both
                measured = share * dense.latency_ms.p50
            attempts.append({"predicted_ms": chosen.latency_ms, "measured_ms": measured, "target_ms": target_ms})
            measured_trials.append((measured, chosen))
            run.say("fit", f"measured {measured:.2f} ms, target {target_ms:.2f} ms", None)
            met = measured <= target_ms * (AIM + SLACK)
            if met and (measured >= ENOUGH * target_ms or attempt > 0):
                break
            if top is None and attempt > 0:  # nothing in the space is predicted to be fast enough
                break
            residuals.append(predict.correction * measured / chosen.latency_ms)
            # the mean over the attempts: one measurement on a busy machine must not swing the search
            predict = replace(predict, correction=math.exp(sum(map(math.log, residuals)) / len(residuals)))
    if not measured_trials:
        raise DataError("the search has no trial to choose from: every one failed (see study.journal)")
    within = [m for m in measured_trials if m[0] <= target_ms * (AIM + SLACK)]
    measured, chosen = min(within, key=lambda m: m[1].loss) if within else min(measured_trials, key=lambda m: m[0])
    found = Fitted(chosen.candidate, chosen.latency_ms, measured, target_ms, asked, predict.correction, tuple(attempts))
    write(record, found)
    return found


def _measure_structure(run: Run, ev: Any, candidate: Candidate) -> tuple[float, float]:
    """(p50 in ms of a whole export, median share of the dense request sent beside it) at the dense caption lengths.

    Before distillation a generator may ramble; longer captions are not a slower structure (nor shorter ones a faster).
    """
    from mmcompress.export.bundle import write_bundle
    from mmcompress.measure.latency import end_to_end
    from mmcompress.runtime import load as load_bundle

    folder = run.folder / "scratch"
    refit = run.spec.search.judge == "measured"  # latency needs none; it only keeps captions at their usual length
    write_bundle(run.spec, pruned(run, ev, candidate, refit), candidate.precision, candidate.kept, folder, prove=False)
    threads = run.spec.measure.threads
    pair = {"new": load_bundle(folder, threads), "dense": load_bundle(run.folder / "baseline", threads)}
    requests = [{next(iter(run.spec.inputs)): i} for i in run.data.load("val", 32, seed=1).images]
    found = end_to_end(pair, requests, run.spec.measure.warmup, min(96, run.spec.measure.rounds))
    shutil.rmtree(folder, ignore_errors=True)
    new, dense = found["new"], found["dense"]
    extra = 0.0
    for graph, steps in new.calls.items():
        node, _, name = graph.partition("/")
        if name == "step":
            extra += (steps - dense.calls[graph]) * new.nodes[node].p50 / max(steps, 1.0)
    shares = [(a - extra) / b for a, b in zip(new.samples, dense.samples, strict=True)]
    return new.latency.p50 - extra, statistics.median(shares)
