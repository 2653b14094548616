"""Methods side by side on one pipeline and target: the same evidence, evaluations, training and measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcompress.errors import DataError, SpecError, suggest_nearest
from mmcompress.experiments.baselines import BASELINES, Baseline
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.structure import Candidate
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.latency.bench import (
    MAX_REQUESTS_FACTOR,
    MIN_REQUESTS,
    BenchmarkOptions,
)
from mmcompress.measure.latency.bench_with_replay import bench_with_replay
from mmcompress.prune.importance.inputs import ImportanceInputs, score_units
from mmcompress.prune.refit import measure_grams
from mmcompress.registry import IMPORTANCE
from mmcompress.report.comparison_pages import ClaimResult, write_comparison
from mmcompress.results.records import Summary
from mmcompress.run.compress.recipe import compress_pipeline
from mmcompress.run.compress.training import count_trained_steps
from mmcompress.run.evaluate import evaluate_artifact
from mmcompress.run.fit import fit_structure
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.prepared import PreparedRun
from mmcompress.run.profile import BENCH_REQUESTS, Profile
from mmcompress.run.stages import prepare_run
from mmcompress.run.structure_benchmark import measure_structure
from mmcompress.runtime.timing import Clock
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.spec.schema import Distill, Spec
from mmcompress.spec.target import require_one_target
from mmcompress.stats import SplitScores, decide_claim
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import OnProgress, RunContext, ignore_progress, open_run

MAX_LATENCY_RATIO = 1.05
"""Latencies of which one is at most so many times the other are equal."""


UNLIMITED_MINUTES = 1e5
"""Minutes."""


TEACHER_LOSSES = ("embedding", "tokens", "affinity", "logits", "hidden", "cross")
"""Losses that a teacher is needed for."""


def compare(
    spec_path: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = tuple(BASELINES),
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    on_progress: OnProgress = ignore_progress,
    bench: Benchmarker | None = None,
    clock: Clock | None = None,
) -> dict[str, Summary]:
    """Every method's summary, in a folder of its own in `out`, and `compare.html` beside them.

    A method that is done is not done again when resumed. Raises `SpecError` for an unknown method or several targets.
    """
    for name in methods:
        if name not in BASELINES:
            raise SpecError(f"compare: unknown method '{name}'; {suggest_nearest(name, BASELINES)}")
    require_one_target(load_spec(spec_path, overrides))
    r = open_run(
        spec_path,
        out,
        space=space,
        overrides=overrides,
        resume=resume,
        on_progress=on_progress,
        bench=bench,
        clock=clock,
    )
    require_same_effort(r)
    for name in methods:
        if fixed := BASELINES[name].fixed:
            fixed(r)  # what can't be made in this search space is told before hours of work
    suited = [name for name in methods if BASELINES[name].is_suitable(r)]
    if methods and not suited:
        raise SpecError(
            f"compare: '{methods[0]}' is of no use here: {BASELINES[methods[0]].why_unsuitable}"
        )
    methods = suited
    prepared = prepare_run(r)
    r, dense = prepared.run, prepared.dense
    wanted = list(
        dict.fromkeys(m for name in methods for m in (BASELINES[name].structure_of, name) if m)
    )
    found: dict[str, Summary] = {}
    steps = 0
    for name in wanted:
        record = r.folder.subfolder(name).summary
        if not record.exists():
            on_progress("compare", name, None)
            make_cell(r, name, method=BASELINES[name], prepared=prepared, steps=steps)
        found[name] = read_record(Summary, record)
        steps = steps or count_trained_steps(r.folder.subfolder(name))
        write_comparison(
            found,
            {n: BASELINES[n].about for n in found},
            claims=_claims(r, dense, methods=list(found)),
            folder=r.folder.path,
        )
    return found


def _claims(r: RunContext, dense: Profile, *, methods: Sequence[str]) -> list[ClaimResult]:
    """Of every other method, whether the search keeps more."""
    others = [name for name in methods if name != "searched" and "searched" in methods]
    return [
        judge_claim(
            r,
            dense,
            says=f"The search keeps more than '{name}'",
            better=("searched",),
            worse=(name,),
        )
        for name in others
    ]


def judge_claim(
    r: RunContext,
    dense: Profile,
    *,
    says: str,
    better: Sequence[str],
    worse: Sequence[str],
    apart: bool = False,
) -> ClaimResult:
    """A claim that some cells keep more than others, with its verdict; `apart`: at whatever latency.

    At unequal latency nothing is claimed, but of the side that keeps more and takes no longer.
    """
    tallies = [
        [read_record(SplitScores, r.folder.subfolder(name).outcomes).compressed for name in side]
        for side in (better, worse)
    ]
    said, gap, half = decide_claim(*tallies)
    if not apart:
        found = measure_side_by_side(r, dense, names=(*better, *worse))
        more, less = (
            [found[n] for n in side] for side in ((better, worse) if gap > 0 else (worse, better))
        )
        low, high = min(found.values()), max(found.values())
        if high > MAX_LATENCY_RATIO * low and not (abs(gap) > half and max(more) <= min(less)):
            said = f"not at equal latency ({low:.1%} and {high:.1%} of the dense pipeline's)"
    return says, said, gap, half


def measure_side_by_side(
    r: RunContext, dense: Profile, *, names: Sequence[str]
) -> dict[str, float]:
    """What the artifacts of some cells take, over the dense pipeline, all of them measured in turn; measured once.

    Their summaries were measured minutes apart, and a machine that others use changes its pace meanwhile, by as much
    as is to be told. On another device it is what was predicted; one structure takes what it takes.
    """

    fits = {n: read_record(FittedStructure, r.folder.subfolder(n).fitted) for n in names}
    if r.device_readings or len({f.candidate.key() for f in fits.values()}) == 1:
        return {n: f.measured_ms / dense.latency_ms.p50 for n, f in fits.items()}
    record, key, m = r.folder.side_by_side, " ".join(names), r.spec.measure
    known: dict[str, dict[str, float]] = json.loads(record.read_text()) if record.exists() else {}
    if key not in known:
        r.on_progress("measure", f"{', '.join(names)} and the dense pipeline, in turn", None)
        bundles = {"fp32": r.shared.baseline, **{n: r.folder.subfolder(n).bundle for n in names}}
        found = bench_with_replay(
            bundles,
            r.load_requests(BENCH_REQUESTS),
            options=BenchmarkOptions(
                warmup=m.warmup,
                max_requests=MAX_REQUESTS_FACTOR * m.requests,
                traces=dense.traces,
                threads=m.threads,
            ),
            dense_ms=dense.latency_ms.p50,
            benchmark=r.bench.benchmark_bundles,
        )
        known[key] = {n: found[n].latency.p50 / found["fp32"].latency.p50 for n in names}
        write_record(record, known)
    return known[key]


def require_same_effort(r: RunContext) -> None:
    """Raise `DataError` where a comparison is to go on with more or fewer trials than it was begun with."""
    effort = lambda spec: (spec.search.trials, spec.search.level_switches)
    begun = effort(read_record(Spec, r.folder.spec))
    if effort(r.spec) != begun:
        raise DataError(
            f"{r.folder}: begun with {begun[0]} trials and {begun[1]} mutations; with others rows would not be equal"
        )


def make_cell(
    r: RunContext,
    name: str,
    *,
    method: Baseline,
    prepared: PreparedRun,
    steps: int = 0,
) -> None:
    """One method the whole way, in the folder `name`; it leaves a summary.

    `steps`: so many steps of training, however long they take; 0: as long as the spec says.
    """
    folder = r.folder.subfolder(name)
    timings = folder.read_timings()
    spec = _brief(r.spec, known=bool(method.structure_of))
    spec = replace(spec, distill=_training(spec.distill, method, steps=steps))
    if method.importance:
        scored = replace_scores(r, prepared.sensitivity, importance=method.importance)
        prepared = replace(prepared, sensitivity=scored)
        spec = replace(spec, prune=replace(spec.prune, importance=method.importance))
    run = replace(r, folder=folder, spec=spec, timings=timings)
    if method.fixed is not None:
        fitted = _as_is(run, prepared, candidate=method.fixed(run))
    elif method.structure_of:
        fitted = read_record(FittedStructure, r.folder.subfolder(method.structure_of).fitted)
        fixed = {
            n: node.precision for n, node in spec.model_nodes().items() if node.precision != "auto"
        }
        fitted = replace(
            fitted,
            candidate=replace(fitted.candidate, precision=fitted.candidate.precision | fixed),
        )
        write_record(folder.fitted, fitted)
    else:
        assert method.propose is not None
        fitted = fit_structure(run, prepared, open_proposals=method.propose)
    compressed = compress_pipeline(run, prepared, fitted=fitted, from_scratch=method.scratch)
    evaluate_artifact(run, prepared, fitted=fitted, compressed=compressed)


def _brief(spec: Spec, known: bool) -> Spec:
    """Without what a comparison does not show; a structure of known latency is measured for a tenth of the time."""
    m = spec.measure
    rounds = max(MIN_REQUESTS, m.requests // MAX_REQUESTS_FACTOR) if known else m.requests
    return replace(
        spec,
        data=replace(spec.data, report=()),
        measure=replace(m, memory=False, requests=min(rounds, m.requests)),
    )


def _training(d: Distill, method: Baseline, *, steps: int) -> Distill:
    """How a method is trained: for as many steps as the others, with its losses."""
    if not method.train or not d.steps:
        return replace(d, steps=0)
    if method.task_loss_only and (d.contrast or d.caption):
        d = replace(d, **dict.fromkeys(TEACHER_LOSSES, 0.0), caption=d.caption or 1.0)  # type: ignore[arg-type]
    return replace(d, steps=steps, minutes=UNLIMITED_MINUTES) if steps else d


def _as_is(run: RunContext, prepared: PreparedRun, *, candidate: Candidate) -> FittedStructure:
    ev, dense, predict = prepared.sensitivity, prepared.dense, prepared.predictor
    ms, target_ms = predict(candidate), run.goal.target_ms(dense.latency_ms)
    measured = ms if run.device_readings else _measured(run, ev, candidate=candidate, dense=dense)
    fitted = FittedStructure(
        candidate=candidate,
        predicted_ms=ms,
        measured_ms=measured,
        target_ms=target_ms,
        search_effort=0,
        correction=predict.correction,
    )
    write_record(run.folder.fitted, fitted)
    return fitted


def _measured(run: RunContext, ev: Sensitivity, *, candidate: Candidate, dense: Profile) -> float:
    return measure_structure(run, ev, candidate=candidate, dense=dense).estimate_long_run_ms(
        candidate.precision, run.shared.reference_runs
    )


def replace_scores(r: RunContext, ev: Sensitivity, *, importance: str) -> Sensitivity:
    """The evidence with the scores of another criterion."""

    batch = r.pipeline.collate(r.data.load("train", r.spec.data.calibration))
    if not all(ev.grams.values()):  # they were not needed for the search
        ev = replace(ev, grams=measure_grams(r.pipeline, r.models, batch=batch))
    material = ImportanceInputs(
        pipeline=r.pipeline, models=r.models, batch=batch, grams=ev.grams, seed=r.spec.seed
    )
    return replace(ev, scores=score_units(IMPORTANCE.get(importance), material))
