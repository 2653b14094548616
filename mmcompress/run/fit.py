"""Stage: search, then measure the best structure before anything is trained, until one lies just under the target."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import DataError
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.drift import (
    DENSE_NAME,
    append_reference_run,
    compute_machine_speed_factor,
    load_reference_runs,
)
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.latency.bench import MAX_REQUESTS_FACTOR, has_time_budget
from mmcompress.measure.latency.bench_with_replay import bench_with_replay
from mmcompress.results.records import Attempt, Trial
from mmcompress.run.profile import BENCH_REQUESTS, Profile
from mmcompress.search.build_problem import AIMED_SHARE, build_problem, find_fastest
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.evaluator import start_evaluator
from mmcompress.search.linearize import linearize_successively
from mmcompress.search.problem import SearchProblem
from mmcompress.search.run_search import (
    FULL_BUDGET_SHARE,
    adjust_structure,
    choose_trial,
    run_search,
)
from mmcompress.search.sensitivity.store import Sensitivity, select_fp32_blocks
from mmcompress.search.short_finetune import rank_by_short_finetuning
from mmcompress.search.study import read_first_error, open_study
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext

ACCEPTED_WIDTH, MIN_MARGIN, MAX_MARGIN, MIN_TARGET_SHARE = 0.03, 0.01, 0.02, 0.95
"""A structure is accepted that measures under its target by a margin, and not by more than `WIDTH` again, nor less
than half the margin over `NEAR` of it: more was cut than needed. The margin is what a measurement of so many samples
may be off by, in bounds: no less than what the loads of `measure.latency.LOADS` leave open.
Of a finished artifact `NEAR` says the same, unless it was meant to be faster: nothing slower was within the target."""


MAX_BUDGET_SHIFT = 0.08
"""The share of a budget by which it may have moved for a structure to be fitted to it instead of searched for anew."""


MAX_FIT_ATTEMPTS, MARGIN_BOOTSTRAP_DRAWS = 5, 500


Propose = Callable[[Predictor, float, int], Trial | None]
"""(predictor, budget in ms, attempt) -> the structure to measure; over the budget where nothing lies within."""


@contextmanager
def open_search(run: RunContext, ev: Sensitivity) -> Iterator[Propose]:
    """Proposals of the search: the best trial within the budget, the fastest one where none is.

    What misses by little is fitted to the budget, what misses by more is searched for anew.
    """
    last: Trial | None = None
    known: set[str] = set()
    with start_evaluator(run, ev) as who:

        def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial | None:
            nonlocal last
            inside, good = linearize_successively(
                run, ev, predict=predict, budget_ms=budget_ms, who=who
            )
            near = (
                last is not None
                and abs(predict(last.candidate) / budget_ms - 1) <= MAX_BUDGET_SHIFT
            )
            found = (
                adjust_structure(
                    run,
                    inside,
                    predictor=predict,
                    budget_ms=budget_ms,
                    evaluator=who,
                    structure=last.candidate,
                )
                if last and near
                else None
            )
            if found is None or found.candidate.key() in known:
                trials = run_search(
                    run,
                    inside,
                    predictor=predict,
                    budget_ms=budget_ms,
                    evaluator=who,
                    attempt=attempt,
                    known_candidates=good,
                )
                found = rank_by_short_finetuning(
                    run,
                    inside,
                    predict=predict,
                    budget_ms=budget_ms,
                    trials=trials,
                    best=choose_trial(run, who, trials=trials, budget_ms=budget_ms),
                )
            last = found
            known.update([found.candidate.key()] if found else ())
            return found

        yield propose


@dataclass(frozen=True, kw_only=True)
class FittedStructure:
    """The structure that will be distilled, with what was predicted and measured of it."""

    candidate: Candidate
    predicted_ms: float
    measured_ms: float
    target_ms: float
    search_effort: int
    """Trials and mutations of the search behind it: a resumed run that asks for more searches again."""
    correction: float
    """Measured over predicted latency, as fed back to the predictor."""
    floor_ms: float = 0.0
    """The lowest latency predicted of anything in the space; `fixed_ms`: the part of it that no block accounts for."""
    fixed_ms: float = 0.0
    fixed_ms_by_node: dict[str, float] = field(default_factory=dict)
    """`fixed_ms` by node, and `lowest`: see `records.Target`."""
    lowest_reachable: dict[str, float] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    final_to_fitted: float = 1.0
    """See `fit`."""
    exhausted: bool = False
    """Whether it is the largest structure that the search has within the target."""

    @property
    def aimed_share(self) -> float:
        """The share of the target that was aimed at; less, if it was measured to be faster and nothing is larger."""
        least = min(self.predicted_ms, self.measured_ms) if self.exhausted else self.predicted_ms
        return least / self.target_ms

    def next_final_to_fitted(self, reached: float) -> float:
        """The bias for what is made after an artifact of this structure that takes such a share of its target."""
        return self.final_to_fitted * reached / (self.measured_ms / self.target_ms)


def fit_structure(
    run: RunContext,
    ev: Sensitivity,
    *,
    predict: Predictor,
    dense: Profile,
    bias: float = 1.0,
    method: Callable[..., Any] = open_search,
    before: int = 0,
) -> FittedStructure:
    """Choose a structure, measure it before anything is trained; a miss corrects the prediction, and again.

    Latency does not depend on the weights, so no time is lost on distilling what would miss the target. `bias`: final
    over fitted latency of an artifact made before; `method(run, evidence)`: a context that gives a `Propose`;
    `before`: structures measured for earlier artifacts, so that the search goes on from them.
    """
    record = run.folder.fitted
    asked = run.spec.search.trials + run.spec.search.level_switches
    if record.exists():
        found = read_record(FittedStructure, record)
        if found.search_effort >= asked and found.final_to_fitted == bias:
            return found
        run.folder.discard_fitted_structure(search_goes_on=found.search_effort < asked)
    goal, latency = run.goal, dense.latency_ms
    target_ms = goal.target_ms(latency)
    predict = replace(
        predict, correction=predict.correction * bias, p95_ratio=goal.p95_ratio(latency)
    )
    p = build_problem(run, ev, predictor=predict, budget_ms=target_ms)
    if (least := predict(find_fastest(p, predict))) > target_ms:
        told = f"nothing in the search space is predicted to take less than {least:.2f} ms"
        run.on_progress(
            "search",
            f"{told}, the target is {target_ms:.2f} ms: the nearest miss will be made",
            None,
        )
    with method(run, ev) as propose:
        measured, predict, spent = _approach(
            run,
            ev,
            propose=propose,
            predict=predict,
            dense=dense,
            target_ms=target_ms,
            bias=bias,
            before=before,
        )
    if not measured:
        first = read_first_error(open_study(run.folder.study, run.spec.seed))
        raise DataError(
            f"the search has no trial to choose from: every one failed, the first with {first or '?'}"
        )
    within = [m for m in measured if m.target_share(target_ms) <= m.high]
    near = lambda m: (max(m.low - m.target_share(target_ms), 0.0), m.trial.loss)
    top = min(within, key=near, default=min(measured, key=lambda m: m.bounded_ms))
    p = build_problem(run, ev, predictor=predict, budget_ms=target_ms)
    attempts = tuple(
        Attempt(
            predicted_ms=m.predicted_ms,
            measured_ms=m.bounded_ms,
            target_ms=target_ms,
            margin=m.benchmark.margin,
            node_ratios=m.benchmark.node_ratios,
        )
        for m in measured
    )
    smallest = find_fastest(p, predict)
    found = FittedStructure(
        candidate=top.trial.candidate,
        predicted_ms=top.predicted_ms,
        measured_ms=top.bounded_ms,
        target_ms=target_ms,
        search_effort=asked,
        correction=predict.correction,
        floor_ms=predict(smallest),
        fixed_ms=predict.fixed_ms(smallest),
        fixed_ms_by_node=predict.fixed_ms_by_node(smallest),
        lowest_reachable=_lowest(run, predict, p=p, smallest=smallest),
        attempts=attempts,
        final_to_fitted=bias,
        exhausted=spent,
    )
    write_record(record, found)
    return found


def _lowest(
    run: RunContext, predict: Predictor, *, p: SearchProblem, smallest: Candidate
) -> dict[str, float]:
    """What the smallest structure is predicted to have of everything that is limited, in the best precisions for it."""
    limits = run.spec.limits

    def least(load: Callable[[Candidate], float]) -> float:
        precision = dict(smallest.precision)
        for n, options in p.precisions.items():
            precision[n] = min(
                options,
                key=lambda o, n=n: load(Candidate(smallest.kept_units, {**precision, n: o})),  # type: ignore[misc]
            )
        return float(load(Candidate(smallest.kept_units, precision)))

    found = {f"p50 of '{n}'": least(lambda c, n=n: predict.node_ms(n, c)) for n in limits.node_ms}  # type: ignore[misc]
    if limits.params_m is not None:
        found["parameters"] = least(run.footprint.total_params) / 1e6
    if limits.size_mb is not None:
        found["size"] = least(run.footprint.size_mb)
    if limits.memory_mb is not None:
        found["memory"] = least(run.footprint.memory_mb)
    return found


@dataclass(frozen=True, kw_only=True)
class StructureBenchmark:
    """A structure as it was measured beside the dense pipeline.

    `ms`: to compare with the target; `over`: the most that a node took of a limit of its own; `nodes`: what each took
    over the same of the dense pipeline, `nodes_ms` in milliseconds; `window`: which of those in `measure.anchors` it
    was, None where the target has nothing to do with the dense pipeline.
    """

    ms: float
    worst_limit_ratio: float
    margin: float
    """See `WIDTH`."""
    node_ratios: dict[str, float]
    node_ms: dict[str, float] = field(default_factory=dict)
    run_index: int | None = None

    def long_run_ms(self, precision: Mapping[str, str], record: Path) -> float:
        """`ms` as all windows on record have it: moods of the machine come and go, and all structures are to be held
        against the same."""

        if self.run_index is None:
            return self.ms
        return self.ms * compute_machine_speed_factor(
            self.node_ms,
            precision,
            reference_runs=load_reference_runs(record),
            run_index=self.run_index,
        )


@dataclass(frozen=True, kw_only=True)
class FitAttempt:
    """A structure measured whole, beside what was predicted of it, by a predictor of that correction."""

    trial: Trial
    predicted_ms: float
    correction: float
    benchmark: StructureBenchmark
    measured_ms: float
    bounded_ms: float
    """`measured_ms`, or if a node was over its limit, the target exceeded by as much."""

    @property
    def high(self) -> float:
        return 1 - self.benchmark.margin

    @property
    def low(self) -> float:
        return min(
            max(self.high - ACCEPTED_WIDTH, MIN_TARGET_SHARE + self.benchmark.margin / 2),
            self.high - MIN_MARGIN,
        )

    def target_share(self, target_ms: float) -> float:
        return self.bounded_ms / target_ms


def _approach(
    run: RunContext,
    ev: Sensitivity,
    *,
    propose: Propose,
    predict: Predictor,
    dense: Profile,
    target_ms: float,
    bias: float,
    before: int,
) -> tuple[list[FitAttempt], Predictor, bool]:
    """Propose and measure in turn until a structure lies just under the target; (what was measured, the predictor,
    whether the last is as large as it may be)."""
    found: list[FitAttempt] = []
    spent = False
    record = run.shared.reference_runs
    for attempt in range(MAX_FIT_ATTEMPTS):
        chosen = propose(predict, target_ms * AIMED_SHARE, before + attempt)
        if chosen is None or any(chosen.candidate == m.trial.candidate for m in found):
            break
        predicted = predict(chosen.candidate)
        if run.device_readings:  # this is not the device that the target is for
            seen = StructureBenchmark(
                ms=predicted, worst_limit_ratio=0.0, margin=0.0, node_ratios={}
            )
            return (
                [
                    FitAttempt(
                        trial=chosen,
                        predicted_ms=predicted,
                        correction=1.0,
                        benchmark=seen,
                        measured_ms=predicted,
                        bounded_ms=predicted,
                    )
                ],
                predict,
                False,
            )
        with run.time_stage("fit"):
            run.on_progress(
                "fit", f"measuring the best structure (predicted {predicted:.2f} ms)", None
            )
            seen = measure_structure(run, ev, candidate=chosen.candidate, dense=dense)
        found.append(
            FitAttempt(
                trial=chosen,
                predicted_ms=predicted,
                correction=predict.correction,
                benchmark=seen,
                measured_ms=0.0,
                bounded_ms=0.0,
            )
        )
        for i, m in enumerate(found):
            ms = bias * m.benchmark.long_run_ms(m.trial.candidate.precision, record)
            found[i] = replace(
                m, measured_ms=ms, bounded_ms=max(ms, m.benchmark.worst_limit_ratio * target_ms)
            )
        m = found[-1]
        told = f"measured {m.bounded_ms:.2f} ms, target {target_ms:.2f} ms, give or take {seen.margin:.1%}"
        run.on_progress("fit", told, None)
        if m.low <= m.target_share(target_ms) <= m.high:
            break
        if (
            spent := m.target_share(target_ms) < m.low
            and predicted < FULL_BUDGET_SHARE * AIMED_SHARE * target_ms
        ):
            break
        if (
            chosen.latency_ms > target_ms * AIMED_SHARE and attempt > 0
        ):  # nothing is predicted to be fast enough
            break
        # a mean: one measurement on a busy machine must not swing the search; the last ones are nearest to the target
        weights = [2.0**i for i in range(len(found))]
        residuals = [_residual(run, predict, m=m) for m in found]
        mean = sum(w * math.log(r) for w, r in zip(weights, residuals, strict=True)) / sum(weights)
        predict = replace(predict, correction=math.exp(mean))
    return found, predict, spent


def _residual(run: RunContext, predict: Predictor, *, m: FitAttempt) -> float:
    """The correction of the predictor that would have been right about a structure."""
    off, limits = [m.measured_ms / m.predicted_ms], run.spec.limits.node_ms
    if (
        m.benchmark.worst_limit_ratio > 1
    ):  # by as much as brings the node within its limit, were it as far off
        asked = replace(predict, correction=m.correction)
        off.append(
            m.benchmark.worst_limit_ratio
            / max(asked.node_ms(n, m.trial.candidate) / limit for n, limit in limits.items())
        )
    return m.correction * max(off)


def measure_structure(
    run: RunContext, ev: Sensitivity, *, candidate: Candidate, dense: Profile
) -> StructureBenchmark:
    """Measure a structure as a whole export.

    It and the dense pipeline are sent the same requests, and both write what the dense one does: before distillation a
    generator may ramble, and that is not a slower structure.
    """

    folder, m = run.folder.scratch, run.spec.measure
    models = build_pruned_models(run, ev, candidate=candidate, refit=False)
    run.write_bundle(
        models,
        candidate.precision,
        kept=candidate.kept_units,
        folder=folder,
        prove=False,
        fp32_blocks=select_fp32_blocks(ev, candidate),
    )
    del models  # of a large pipeline: its sessions need the memory
    bundles = {
        "new": folder,
        DENSE_NAME: run.shared.baseline,
        **list_reference_bundles(run, candidate, dense=dense),
    }
    how = (
        dense.traces,
        dense.latency_ms.p50,
        m.threads,
        m.warmup,
        MAX_REQUESTS_FACTOR * m.requests,
    )
    found = bench_with_replay(
        bundles, run.load_requests(BENCH_REQUESTS), *how, benchmark=run.bench.benchmark_bundles
    )
    shutil.rmtree(folder, ignore_errors=True)
    new, old, statistic = found.pop("new"), found[DENSE_NAME], run.goal.statistic
    ms, window = float(getattr(new.latency, statistic)), None
    if (
        run.goal.kind == "speedup"
    ):  # a machine that is slower now is slower for both, if not equally
        window = len(append_reference_run(run.shared.reference_runs, found).runs) - 1
        ms *= getattr(dense.latency_ms, statistic) / getattr(old.latency, statistic)
    over = max(
        (new.nodes[n].p50 / limit for n, limit in run.spec.limits.node_ms.items()), default=0.0
    )
    nodes = {n: x.p50 / old.nodes[n].p50 for n, x in new.nodes.items() if old.nodes[n].p50 > 0}
    nodes_ms = {n: x.p50 for n, x in new.nodes.items()}
    return StructureBenchmark(
        ms=ms,
        worst_limit_ratio=over,
        margin=estimate_margin(new.samples, old.samples, statistic=statistic),
        node_ratios=nodes,
        node_ms=nodes_ms,
        run_index=window,
    )


def list_reference_bundles(
    run: RunContext, candidate: Candidate, *, dense: Profile
) -> dict[str, Path]:
    """The dense pipeline in every precision that a structure has, to be measured beside it where there is time."""

    if run.goal.kind != "speedup" or not has_time_budget(dense.latency_ms.p50):
        return {}
    found = {p: run.shared.quantized / p for p in sorted(set(candidate.precision.values()))}
    return {p: at for p, at in found.items() if at.exists()}


def estimate_margin(new: Sequence[float], old: Sequence[float], *, statistic: str = "p50") -> float:
    """What the ratio of two pipelines may be off by from that of as many other samples: sqrt(2) standard errors.

    Of medians it follows from the interquartile range of the ratios of pairs; of p95s it is bootstrapped, and they are
    less sure.
    """
    if statistic == "p50":
        shares = [a / b for a, b in zip(new, old, strict=True)]
        low, _, high = statistics.quantiles(shares, n=4)
        error = 1.253 * (high - low) / 1.349 / math.sqrt(len(shares)) / statistics.median(shares)
        return min(max(math.sqrt(2) * error, MIN_MARGIN), MAX_MARGIN)
    rows = np.random.default_rng(0).integers(0, len(new), (MARGIN_BOOTSTRAP_DRAWS, len(new)))
    tails = [np.percentile(np.asarray(x)[rows], 95, axis=1) for x in (new, old)]
    ratios = tails[0] / tails[1]
    return min(max(math.sqrt(2) * float(ratios.std() / ratios.mean()), MIN_MARGIN), 2 * MAX_MARGIN)
