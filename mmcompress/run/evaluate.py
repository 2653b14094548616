"""Stage: measure and judge both bundles, and put everything in one record."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.graph.references import find_unjoined_encoders
from mmcompress.graph.structure import Candidate, KeptUnits, removed_share
from mmcompress.measure.cost_model.drift import (
    DENSE_NAME,
    compute_machine_speed_factor,
    include_latest_run,
)
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.latency.bench import (
    MAX_REQUESTS_FACTOR,
    PipelineLatency,
    Samples,
    bench_repeats,
    comparison_seconds,
    has_time_budget,
)
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
from mmcompress.measure.latency.memory import peak_memory_mb
from mmcompress.metrics.answers import Answers, answer_pairs, score_answers
from mmcompress.results.records import Proof, SearchResult, Side, Summary, Target, Trial
from mmcompress.results.target import list_exceeded_bounds, scale_latencies
from mmcompress.run.adopt import restore_measurements
from mmcompress.run.assemble import assemble_side, summarize_search
from mmcompress.run.compress import NodeCounts
from mmcompress.run.fit import MIN_TARGET_SHARE, FittedStructure, list_reference_bundles
from mmcompress.run.profile import BENCH_REQUESTS, Profile
from mmcompress.run.warnings import list_warnings
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import describe_cpu, list_package_versions, read_git_commit
from mmcompress.search.linearize import load_interaction_factors
from mmcompress.search.study import count_failures, read_finished_trials, open_study
from mmcompress.stats import (
    Latency,
    PerSampleScores,
    Quality,
    compute_quality_retained,
    estimate_quality,
)
from mmcompress.storage import read_record, to_plain, write_record
from mmcompress.workspace.context import RunContext

EXTRA_BENCH_REPEATS, PAUSE_SECONDS = 3, 15.0
"""Sittings, and seconds before each, that are added where an artifact seems to lie elsewhere: all of them, for to stop
as soon as it seems to hit would make it more likely to."""


def evaluate_artifact(
    r: RunContext,
    fitted: FittedStructure,
    dense: Profile,
    counts: NodeCounts,
    proofs: list[Proof],
    patient: bool = False,
) -> Summary:
    """Measure both bundles interleaved, judge both on the full test split, and put everything in one record.

    `patient`: what seems to miss the target is measured for longer.
    """

    spec, c = r.spec, fitted.candidate
    made = read_record(Predictor, r.shared.predictor)
    predict = replace(
        made,
        correction=fitted.correction,
        p95_ratio=r.goal.p95_ratio(dense.latency_ms),
        fp32_blocks=r.fp32_blocks,
    )
    beside = {} if r.device_readings else list_reference_bundles(r, c, dense=dense)
    sitting = lambda before: _sitting(r, dense.latency_ms.p50, beside=beside, before=before)
    splits, said, sittings = ("test", *spec.data.report), {}, [sitting([])]
    for split in splits:
        with r.time_stage("judge"):
            said[split] = _judge(r, split)
        sittings.append(sitting(sittings))
    elsewhere = (
        patient
        and not r.device_readings
        and has_time_budget(dense.latency_ms.p50)
        and not MIN_TARGET_SHARE <= _share(r, sittings) <= 1
    )
    for _ in range(EXTRA_BENCH_REPEATS if elsewhere else 0):
        r.clock.sleep(PAUSE_SECONDS)
        sittings.append(sitting(sittings))
    measured = _latencies(r, sittings, predict=predict, c=c)
    usual = _usual(r, sittings, c=c) if beside and r.goal.kind == "speedup" else 1.0
    figures = _figures(said["test"])
    extra = {split: _figures(said[split]) for split in spec.data.report}
    sides = _sides(r, c, dense=dense, counts=counts, measured=measured, quality=figures)
    target_ms = r.goal.target_ms(measured["baseline"].latency)
    pace = (
        target_ms / fitted.target_ms
    )  # the machine may be slower or faster now than when it was profiled
    trials, result = _trials(r, predict, target_ms=target_ms, pace=pace)
    r.timings["total"] = sum(v for k, v in r.timings.items() if k != "total")
    summary = Summary(
        pipeline=spec.name,
        target=_target(
            r,
            fitted,
            dense=measured["baseline"].latency,
            compressed=sides["compressed"],
            target_ms=target_ms,
            pace=pace,
        ),
        baseline=sides["baseline"],
        compressed=sides["compressed"],
        speedup=measured["baseline"].latency.p50 / measured["compressed"].latency.p50,
        quality_retained=compute_quality_retained(figures["baseline"], figures["compressed"]),
        predicted_latency_ms_p50=pace * fitted.predicted_ms,
        unimodal_ratio=removed_share(c.kept_units, r.blocks, cross=r.cross_modal, crossing=False)
        or 0.0,
        cross_modal_ratio=removed_share(c.kept_units, r.blocks, cross=r.cross_modal, crossing=True),
        kept_units=c.kept_units,
        blocks=r.blocks,
        cross_modal_reasons=r.cross_modal,
        proofs=tuple(proofs),
        search=result,
        trials=trials,
        warnings=(),
        timings=dict(r.timings),
        settings=to_plain(spec),
        versions=list_package_versions(),
        cpu=r.device_readings.cpu if r.device_readings else describe_cpu(),
        seed=spec.seed,
        commit=read_git_commit(),
        command="mmcompress " + " ".join(sys.argv[1:]),
        device=r.device,
        peak_memory_mb=peak_memory_mb(),
        validation_losses=read_validation_losses(r),
        samples=_samples(r, said["test"], split="test"),
        extra_splits=extra,
        attempts=fitted.attempts,
        bench_repeats=len(sittings),
        machine_speed_factor=usual,
        aimed_share=fitted.aimed_share,
    )
    write_record(r.folder.outcomes, {k: s.scores for k, s in said["test"].items()}, indent=None)
    summary = restore_measurements(replace(summary, warnings=list_warnings(summary)), r.folder)
    write_record(r.folder.summary, summary)
    return summary


def _bundles(r: RunContext) -> dict[str, Path]:
    return {"baseline": r.shared.baseline, "compressed": r.folder.bundle}


def _sides(
    r: RunContext,
    c: Candidate,
    *,
    dense: Profile,
    counts: NodeCounts,
    measured: dict[str, Any],
    quality: dict[str, Any],
) -> dict[str, Side]:
    """Each bundle with its latency, quality, sizes and memory."""

    sizes = {
        "baseline": {n: (dense.params[n], dense.macs[n], 0.0) for n in dense.params},
        "compressed": counts,
    }
    kept: dict[str, dict[str, KeptUnits]] = {
        "baseline": {n: {} for n in r.models},
        "compressed": c.kept_units,
    }
    of = lambda k, n, crossing: removed_share(
        {n: kept[k][n]}, r.blocks, cross=r.cross_modal, crossing=crossing
    )
    asked = r.spec.measure.memory or r.spec.limits.memory_mb is not None
    found = {}
    for k, bundle in _bundles(r).items():
        shares = {n: (of(k, n, False), of(k, n, True)) for n in r.models}
        memory = r.bench.measure_memory_mb(bundle) if asked else 0.0
        found[k] = assemble_side(
            r.spec,
            bundle,
            measured=measured[k],
            quality=quality[k],
            counts=sizes[k],
            ratio=shares,
            memory_mb=memory,
        )
    return found


def _target(
    r: RunContext,
    fitted: FittedStructure,
    *,
    dense: Latency,
    compressed: Side,
    target_ms: float,
    pace: float,
) -> Target:

    over = list_exceeded_bounds(r.spec, r.goal, target_ms=target_ms, side=compressed)
    return Target(
        latency_ms=target_ms,
        speedup=getattr(dense, r.goal.statistic) / target_ms,
        met=not over,
        asked=r.spec.target,
        statistic=r.goal.statistic,
        floor_ms=pace * fitted.floor_ms,
        fixed_ms=pace * fitted.fixed_ms,
        fixed_ms_by_node={n: pace * ms for n, ms in fitted.fixed_ms_by_node.items()},
        lowest_reachable=scale_latencies(fitted.lowest_reachable, pace),
        latency_ms_p50=target_ms if r.goal.statistic == "p50" else None,
        exceeded_bounds=over,
    )


def _trials(
    r: RunContext, predict: Predictor, *, target_ms: float, pace: float
) -> tuple[tuple[Trial, ...], SearchResult]:
    """Every architecture that was tried, once, at the predictor's last word on it."""

    study = open_study(r.folder.study, r.spec.seed)
    unique = {t.candidate.key(): t for t in reversed(read_finished_trials(study))}
    trials = tuple(
        replace(t, latency_ms=pace * predict(t.candidate)) for t in reversed(unique.values())
    )
    found, known = (
        summarize_search(
            trials, count_failures(study), target_ms=target_ms, seconds=r.timings.get("search", 0.0)
        ),
        load_interaction_factors(r.folder),
    )
    return trials, replace(
        found, split_losses=known.losses, linearization_evaluations=known.evaluations
    )


def _sitting(
    r: RunContext, dense_ms: float, *, beside: dict[str, Path], before: list[dict[str, Samples]]
) -> dict[str, Samples]:
    """Both sides measured in turn for a while, and what is to be measured `beside` them, going on where the sittings
    before ended; nothing for another device.

    Loads last as long as those of a fit: in one of three seconds a small pipeline seems 1 to 2 % quicker beside a large
    one than in one of eight. There is one sitting before and one after every split that is judged: a machine
    that others use is faster and slower by the minute, and not equally so for a large model and a small one.
    """
    m, part = r.spec.measure, 2 + len(r.spec.data.report)
    if r.device_readings:
        return {}
    share = (1 + len(beside) / 2) / part
    seconds, loaded = (
        share * comparison_seconds(dense_ms),
        max(1, round(share * bench_repeats(dense_ms))),
    )
    r.on_progress("measure", "baseline and compressed, interleaved", None)
    with r.time_stage("measure"):
        least = -(-m.requests // part)
        sent = sum(len(s["baseline"].ms) for s in before)
        how = (m.warmup, MAX_REQUESTS_FACTOR * least, (), seconds, least, sent, loaded)
        at = {**_bundles(r), **beside}
        return bench_repeated(
            at,
            m.threads,
            r.load_requests(BENCH_REQUESTS),
            *how,
            benchmark=r.bench.benchmark_bundles,
        )


def _latencies(
    r: RunContext, sittings: list[dict[str, Samples]], *, predict: Predictor, c: Candidate
) -> dict[str, Any]:
    """What was measured in all sittings; for another device, what it measured and what is predicted for it."""

    if r.device_readings:
        theirs = r.device_readings.baseline
        return {
            "baseline": theirs,
            "compressed": _expected(replace(predict, p95_ratio=1.0), c, dense=theirs),
        }
    return {k: PipelineMeasurement.from_latency(m) for k, m in _together(sittings).items()}


def _together(sittings: list[dict[str, Samples]]) -> dict[str, PipelineLatency]:
    return {k: sum((s[k] for s in sittings), Samples()).summarize() for k in sittings[0]}


def _usual(r: RunContext, sittings: list[dict[str, Samples]], *, c: Candidate) -> float:
    """The factor from what the artifact took in all sittings to what it takes usually: see `measure.anchors`."""

    found = _together(sittings)
    new = {n: ms.p50 for n, ms in found.pop("compressed").nodes.items()}
    dense = found.pop("baseline")
    # not put on record: there everything is dictated, here it writes freely
    return compute_machine_speed_factor(
        new,
        c.precision,
        reference_runs=include_latest_run(r.shared.reference_runs, {DENSE_NAME: dense, **found}),
    )


def _share(r: RunContext, sittings: list[dict[str, Samples]]) -> float:
    """What the artifact took so far, over what it may take."""
    found = _together(sittings)
    return float(
        getattr(found["compressed"].latency, r.goal.statistic)
        / r.goal.target_ms(found["baseline"].latency)
    )


def read_validation_losses(r: RunContext) -> tuple[float, ...]:
    """What training recorded of the loss on choosing pairs, the dense pipeline's first."""
    found: list[float] = []
    number = lambda p: int(p.stem.partition("-")[2] or sys.maxsize)
    for record in sorted(r.folder.list_training_histories(), key=number):
        rows = [row for row in json.loads(record.read_text()) if "choosing" in row]
        found += [row["dense"] for row in rows[:1] if not found] + [row["choosing"] for row in rows]
    return tuple(found)


def _expected(predict: Predictor, c: Candidate, *, dense: Any) -> Any:
    """What is predicted of a candidate on another device, in the form of a measurement of no samples."""
    p50, wide = predict(c), dense.latency.p95 / dense.latency.p50
    nodes = {n: predict.node_ms(n, c) for n in predict.deployed}
    share = (
        1
        - predict.correction
        * (predict.overhead_ms + predict.critical_path_ms(predict.outside_sessions_ms))
        / p50
    )
    latency = {n: Latency(p50=ms, p95=ms * wide, n=0) for n, ms in nodes.items()}
    return replace(
        dense, latency=Latency(p50=p50, p95=p50 * wide, n=0), nodes=latency, model_share=share
    )


@dataclass(frozen=True, kw_only=True)
class SplitAnswers:
    """What one side said to a split, and what the metrics count of it."""

    scores: dict[str, PerSampleScores]
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    vectors: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, answers: Any, metrics: tuple[str, ...]) -> SplitAnswers:

        vectors = answers.vectors.tolist() if "embedding" in metrics else ()
        return cls(
            scores=score_answers(answers, metrics),
            texts=answers.texts,
            answers=answers.answers,
            vectors=vectors,
        )


def _judge(r: RunContext, split: str) -> dict[str, SplitAnswers]:
    """Ask each bundle a whole split, both at once. The dense one answers once for all that is compared to it."""

    pairs, record = r.data.load(split), r.shared.dense_answers(split)
    found = {"baseline": read_record(SplitAnswers, record)} if record.exists() else {}
    with ThreadPoolExecutor() as pool:
        tell = lambda key: lambda share: r.on_progress("judge", f"{key} on {split}", share)
        pipelines = {
            k: load_bundle(at, r.spec.measure.threads)
            for k, at in _bundles(r).items()
            if k not in found
        }
        waiting = {
            k: pool.submit(answer_pairs, p, pairs, tell(k), find_unjoined_encoders(r.spec))
            for k, p in pipelines.items()
        }
        asked = {k: w.result() for k, w in waiting.items()}
    if "baseline" not in found:
        theirs = asked["baseline"]
        found["baseline"] = SplitAnswers.of(theirs, tuple(m.kind for m in r.spec.metrics))
        write_record(record, found["baseline"], indent=None)
    dense = found["baseline"]
    beside = Answers(
        texts=dense.texts,
        references=pairs.texts,
        answers=dense.answers,
        vectors=np.array(dense.vectors),
    )
    return {
        **found,
        "compressed": SplitAnswers.of(
            replace(asked["compressed"], dense=beside), tuple(m.kind for m in r.spec.metrics)
        ),
    }


def _samples(
    r: RunContext, said: dict[str, SplitAnswers], *, split: str
) -> tuple[dict[str, str], ...]:
    """A few texts of both sides for the eye."""
    references = r.data.load(split).texts[:8]
    return tuple(
        {"reference": t, **{k: s.texts[i] for k, s in said.items()}}
        for i, t in enumerate(references)
    )


def _figures(said: dict[str, SplitAnswers]) -> dict[str, dict[str, Quality]]:
    return {
        side: {name: estimate_quality(t) for name, t in s.scores.items()}
        for side, s in said.items()
    }
