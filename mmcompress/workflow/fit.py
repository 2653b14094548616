"""Stage: search, then measure the best structure before anything is trained, until one lies just under the target."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcompress.errors import DataError
from mmcompress.measure.predict import Predictor
from mmcompress.records import Attempt, Candidate, Trial, read, write
from mmcompress.search.moves import Problem
from mmcompress.search.study import first_error, open_study
from mmcompress.workflow.choose import AIM, FULL, adjusted, chosen, floor, jury, problem, pruned, search, spared
from mmcompress.workflow.dense import REQUESTS, WINDOWS, Profile
from mmcompress.workflow.relinearize import relinearized
from mmcompress.workflow.state import Run
from mmcompress.workflow.tryout import tried_out

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

WIDTH, LEAST, MOST, NEAR = 0.03, 0.01, 0.02, 0.95
"""A structure is accepted that measures under its target by a margin, and not by more than `WIDTH` again, nor less
than half the margin over `NEAR` of it: more was cut than needed. The margin is what a measurement of so many samples
may be off by, in bounds: no less than what the loads of `measure.latency.LOADS` leave open.
Of a finished artifact `NEAR` says the same, unless it was meant to be faster: nothing slower was within the target."""
SLIGHT = 0.08
"""The share of a budget by which it may have moved for a structure to be fitted to it instead of searched for anew."""
ATTEMPTS, DRAWS = 5, 500
Propose = Callable[[Predictor, float, int], Trial | None]
"""(predictor, budget in ms, attempt) -> the structure to measure; over the budget where nothing lies within."""


@contextmanager
def searching(run: Run, ev: Evidence) -> Iterator[Propose]:
    """Proposals of the search: the best trial within the budget, the fastest one where none is.

    What misses by little is fitted to the budget, what misses by more is searched for anew.
    """
    last: Trial | None = None
    known: set[str] = set()
    with jury(run, ev) as who:

        def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial | None:
            nonlocal last
            inside, good = relinearized(run, ev, predict, budget_ms, who)
            near = last is not None and abs(predict(last.candidate) / budget_ms - 1) <= SLIGHT
            found = adjusted(run, inside, predict, budget_ms, who, last.candidate) if last and near else None
            if found is None or found.candidate.key() in known:
                trials = search(run, inside, predict, budget_ms, who, attempt, good)
                found = tried_out(run, inside, predict, budget_ms, trials, chosen(run, who, trials, budget_ms))
            last = found
            known.update([found.candidate.key()] if found else ())
            return found

        yield propose


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
    floor_ms: float = 0.0
    """The lowest latency predicted of anything in the space; `fixed_ms`: the part of it that no block accounts for."""
    fixed_ms: float = 0.0
    fixed: dict[str, float] = field(default_factory=dict)
    """`fixed_ms` by node, and `lowest`: see `records.Target`."""
    lowest: dict[str, float] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    bias: float = 1.0
    """See `fit`."""
    spent: bool = False
    """Whether it is the largest structure that the search has within the target."""

    @property
    def meant(self) -> float:
        """The share of the target that was aimed at; less, if it was measured to be faster and nothing is larger."""
        least = min(self.predicted_ms, self.measured_ms) if self.spent else self.predicted_ms
        return least / self.target_ms

    def learnt(self, reached: float) -> float:
        """The bias for what is made after an artifact of this structure that takes such a share of its target."""
        return self.bias * reached / (self.measured_ms / self.target_ms)


def fit(
    run: Run,
    ev: Evidence,
    predict: Predictor,
    dense: Profile,
    bias: float = 1.0,
    method: Callable[..., Any] = searching,
    before: int = 0,
) -> Fitted:
    """Choose a structure, measure it before anything is trained; a miss corrects the prediction, and again.

    Latency does not depend on the weights, so no time is lost on distilling what would miss the target. `bias`: final
    over fitted latency of an artifact made before; `method(run, evidence)`: a context that gives a `Propose`;
    `before`: structures measured for earlier artifacts, so that the search goes on from them.
    """
    record = run.folder / "fitted.json"
    asked = run.spec.search.trials + run.spec.search.mutations
    if record.exists():
        found = read(Fitted, record)
        if found.asked >= asked and found.bias == bias:
            return found
        shutil.rmtree(run.folder / "weights", ignore_errors=True)  # first: they are of the structure on record
        stale = [*run.folder.glob("distill*.json"), *run.folder.glob("training.*")]
        stale += [at for name in ("summary.json", "outcomes.json") if (at := run.folder / name).exists()]
        for left in (*stale, *(run.folder.glob("tryouts.json") if found.asked < asked else ())):
            left.unlink()
        record.unlink()
    goal, latency = run.goal, dense.latency_ms
    target_ms = goal.milliseconds(latency)
    predict = replace(predict, correction=predict.correction * bias, tail=goal.tail(latency))
    p = problem(run, ev, predict, target_ms)
    if (least := predict(floor(p, predict))) > target_ms:
        told = f"nothing in the search space is predicted to take less than {least:.2f} ms"
        run.say("search", f"{told}, the target is {target_ms:.2f} ms: the nearest miss will be made", None)
    with method(run, ev) as propose:
        measured, predict, spent = _approach(run, ev, propose, predict, dense, target_ms, bias, before)
    if not measured:
        first = first_error(open_study(run.folder / "study.journal", run.spec.seed))
        raise DataError(f"the search has no trial to choose from: every one failed, the first with {first or '?'}")
    within = [m for m in measured if m.share(target_ms) <= m.high]
    near = lambda m: (max(m.low - m.share(target_ms), 0.0), m.trial.loss)
    top = min(within, key=near, default=min(measured, key=lambda m: m.ends_ms))
    p = problem(run, ev, predict, target_ms)
    attempts = tuple(Attempt(m.predicted_ms, m.ends_ms, target_ms, m.seen.margin, m.seen.nodes) for m in measured)
    smallest = floor(p, predict)
    found = Fitted(
        top.trial.candidate,
        top.predicted_ms,
        top.ends_ms,
        target_ms,
        asked,
        predict.correction,
        floor_ms=predict(smallest),
        fixed_ms=predict.fixed(smallest),
        fixed=predict.fixed_by_node(smallest),
        lowest=_lowest(run, predict, p, smallest),
        attempts=attempts,
        bias=bias,
        spent=spent,
    )
    write(record, found)
    return found


def _lowest(run: Run, predict: Predictor, p: Problem, smallest: Candidate) -> dict[str, float]:
    """What the smallest structure is predicted to have of everything that is limited, in the best precisions for it."""
    limits = run.spec.limits

    def least(load: Callable[[Candidate], float]) -> float:
        precision = dict(smallest.precision)
        for n, options in p.precisions.items():
            precision[n] = min(options, key=lambda o, n=n: load(Candidate(smallest.kept, {**precision, n: o})))  # type: ignore[misc]
        return float(load(Candidate(smallest.kept, precision)))

    found = {f"p50 of '{n}'": least(lambda c, n=n: predict.node_ms(n, c)) for n in limits.node_ms}  # type: ignore[misc]
    if limits.params_m is not None:
        found["parameters"] = least(run.footprint.total_params) / 1e6
    if limits.size_mb is not None:
        found["size"] = least(run.footprint.size_mb)
    if limits.memory_mb is not None:
        found["memory"] = least(run.footprint.memory_mb)
    return found


@dataclass(frozen=True)
class Seen:
    """A structure as it was measured beside the dense pipeline.

    `ms`: to compare with the target; `over`: the most that a node took of a limit of its own; `nodes`: what each took
    over the same of the dense pipeline, `nodes_ms` in milliseconds; `window`: which of those in `measure.anchors` it
    was, None where the target has nothing to do with the dense pipeline.
    """

    ms: float
    over: float
    margin: float
    """See `WIDTH`."""
    nodes: dict[str, float]
    nodes_ms: dict[str, float] = field(default_factory=dict)
    window: int | None = None

    def usual_ms(self, precision: Mapping[str, str], record: Path) -> float:
        """`ms` as all windows on record have it: moods of the machine come and go, and all structures are to be held
        against the same."""
        from mmcompress.measure.anchors import recall, steadied

        if self.window is None:
            return self.ms
        return self.ms * steadied(self.nodes_ms, precision, recall(record), self.window)


@dataclass(frozen=True)
class Measured:
    """A structure measured whole, beside what was predicted of it, by a predictor of that correction."""

    trial: Trial
    predicted_ms: float
    correction: float
    seen: Seen
    measured_ms: float
    ends_ms: float
    """`measured_ms`, or if a node was over its limit, the target exceeded by as much."""

    @property
    def high(self) -> float:
        return 1 - self.seen.margin

    @property
    def low(self) -> float:
        return min(max(self.high - WIDTH, NEAR + self.seen.margin / 2), self.high - LEAST)

    def share(self, target_ms: float) -> float:
        return self.ends_ms / target_ms


def _approach(
    run: Run,
    ev: Evidence,
    propose: Propose,
    predict: Predictor,
    dense: Profile,
    target_ms: float,
    bias: float,
    before: int,
) -> tuple[list[Measured], Predictor, bool]:
    """Propose and measure in turn until a structure lies just under the target; (what was measured, the predictor,
    whether the last is as large as it may be)."""
    found: list[Measured] = []
    spent = False
    record = run.shared / WINDOWS
    for attempt in range(ATTEMPTS):
        chosen = propose(predict, target_ms * AIM, before + attempt)
        if chosen is None or any(chosen.candidate == m.trial.candidate for m in found):
            break
        predicted = predict(chosen.candidate)
        if run.away:  # this is not the device that the target is for
            seen = Seen(predicted, 0.0, 0.0, {})
            return [Measured(chosen, predicted, 1.0, seen, predicted, predicted)], predict, False
        with run.timed("fit"):
            run.say("fit", f"measuring the best structure (predicted {predicted:.2f} ms)", None)
            seen = measure_structure(run, ev, chosen.candidate, dense)
        found.append(Measured(chosen, predicted, predict.correction, seen, 0.0, 0.0))
        for i, m in enumerate(found):
            ms = bias * m.seen.usual_ms(m.trial.candidate.precision, record)
            found[i] = replace(m, measured_ms=ms, ends_ms=max(ms, m.seen.over * target_ms))
        m = found[-1]
        told = f"measured {m.ends_ms:.2f} ms, target {target_ms:.2f} ms, give or take {seen.margin:.1%}"
        run.say("fit", told, None)
        if m.low <= m.share(target_ms) <= m.high:
            break
        if spent := m.share(target_ms) < m.low and predicted < FULL * AIM * target_ms:
            break
        if chosen.latency_ms > target_ms * AIM and attempt > 0:  # nothing is predicted to be fast enough
            break
        # a mean: one measurement on a busy machine must not swing the search; the last ones are nearest to the target
        weights = [2.0**i for i in range(len(found))]
        residuals = [_residual(run, predict, m) for m in found]
        mean = sum(w * math.log(r) for w, r in zip(weights, residuals, strict=True)) / sum(weights)
        predict = replace(predict, correction=math.exp(mean))
    return found, predict, spent


def _residual(run: Run, predict: Predictor, m: Measured) -> float:
    """The correction of the predictor that would have been right about a structure."""
    off, limits = [m.measured_ms / m.predicted_ms], run.spec.limits.node_ms
    if m.seen.over > 1:  # by as much as brings the node within its limit, were it as far off
        asked = replace(predict, correction=m.correction)
        off.append(m.seen.over / max(asked.node_ms(n, m.trial.candidate) / limit for n, limit in limits.items()))
    return m.correction * max(off)


def measure_structure(run: Run, ev: Evidence, candidate: Candidate, dense: Profile) -> Seen:
    """Measure a structure as a whole export.

    It and the dense pipeline are sent the same requests, and both write what the dense one does: before distillation a
    generator may ramble, and that is not a slower structure.
    """
    from mmcompress.measure import anchors, latency
    from mmcompress.measure.readings import beside

    folder, m = run.folder / "scratch", run.spec.measure
    models = pruned(run, ev, candidate, refit=False)
    run.bundle(models, candidate.precision, candidate.kept, folder, prove=False, spared=spared(ev, candidate))
    del models  # of a large pipeline: its sessions need the memory
    bundles = {"new": folder, anchors.DENSE: run.shared / "baseline", **whole(run, candidate, dense)}
    how = (dense.said, dense.latency_ms.p50, m.threads, m.warmup, latency.MOST * m.rounds)
    found = beside(bundles, run.requests(REQUESTS), *how, benchmark=run.bench.benchmark_bundles)
    shutil.rmtree(folder, ignore_errors=True)
    new, old, statistic = found.pop("new"), found[anchors.DENSE], run.goal.statistic
    ms, window = float(getattr(new.latency, statistic)), None
    if run.goal.kind == "speedup":  # a machine that is slower now is slower for both, if not equally
        window = len(anchors.add(run.shared / WINDOWS, found).seen) - 1
        ms *= getattr(dense.latency_ms, statistic) / getattr(old.latency, statistic)
    over = max((new.nodes[n].p50 / limit for n, limit in run.spec.limits.node_ms.items()), default=0.0)
    nodes = {n: x.p50 / old.nodes[n].p50 for n, x in new.nodes.items() if old.nodes[n].p50 > 0}
    nodes_ms = {n: x.p50 for n, x in new.nodes.items()}
    return Seen(ms, over, margin(new.samples, old.samples, statistic), nodes, nodes_ms, window)


def whole(run: Run, candidate: Candidate, dense: Profile) -> dict[str, Path]:
    """The dense pipeline in every precision that a structure has, to be measured beside it where there is time."""
    from mmcompress.measure.latency import spare
    from mmcompress.measure.readings import ROUNDED

    if run.goal.kind != "speedup" or not spare(dense.latency_ms.p50):
        return {}
    found = {p: run.shared / ROUNDED / p for p in sorted(set(candidate.precision.values()))}
    return {p: at for p, at in found.items() if at.exists()}


def margin(new: Sequence[float], old: Sequence[float], statistic: str = "p50") -> float:
    """What the ratio of two pipelines may be off by from that of as many other samples: sqrt(2) standard errors.

    Of medians it follows from the interquartile range of the ratios of pairs; of p95s it is bootstrapped, and they are
    less sure.
    """
    if statistic == "p50":
        shares = [a / b for a, b in zip(new, old, strict=True)]
        low, _, high = statistics.quantiles(shares, n=4)
        error = 1.253 * (high - low) / 1.349 / math.sqrt(len(shares)) / statistics.median(shares)
        return min(max(math.sqrt(2) * error, LEAST), MOST)
    rows = np.random.default_rng(0).integers(0, len(new), (DRAWS, len(new)))
    tails = [np.percentile(np.asarray(x)[rows], 95, axis=1) for x in (new, old)]
    ratios = tails[0] / tails[1]
    return min(max(math.sqrt(2) * float(ratios.std() / ratios.mean()), LEAST), 2 * MOST)
