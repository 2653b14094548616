"""Stage: measure and judge both bundles, and put everything in one record."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from mmcompress.records import Candidate, Latency, Proof, Summary, plain, read, write
from mmcompress.workflow.dense import Profile, spared_blocks
from mmcompress.workflow.fit import Fitted
from mmcompress.workflow.make import Counts
from mmcompress.workflow.state import Run


def summarize(r: Run, fitted: Fitted, dense: Profile, counts: Counts, proofs: list[Proof]) -> Summary:
    """Measure both bundles interleaved, judge both on the full test split, and put everything in one record."""
    from mmcompress.measure.footprint import memory_mb, peak_mb
    from mmcompress.measure.machine import commit, cpu, versions
    from mmcompress.measure.predict import Predictor
    from mmcompress.metrics.pairs import retained
    from mmcompress.prune.allocation import ratios
    from mmcompress.records import Target
    from mmcompress.report.assemble import search_result, side, unmet, warnings
    from mmcompress.runtime import load as load_bundle
    from mmcompress.search.study import failures, finished, open_study

    spec, c = r.spec, fitted.candidate
    bundles = {"baseline": r.shared / "baseline", "compressed": r.folder / "bundle"}
    pipelines = {k: load_bundle(f, spec.measure.threads) for k, f in bundles.items()}
    predict = replace(
        read(Predictor, r.shared / "predictor.json"), correction=fitted.correction, spared=spared_blocks(r)
    )
    with r.timed("measure"):
        measured = _latencies(r, pipelines, predict, c)
    with r.timed("judge"):
        quality, samples = _judge(r, pipelines, "test")
        extra = {split: _judge(r, pipelines, split)[0] for split in spec.data.report}
    del pipelines  # of large models: another process is about to load them again
    memory = lambda b: memory_mb(b) if spec.measure.memory or spec.limits.memory_mb is not None else 0.0
    sides = {}
    for key, bundle in bundles.items():
        kept = c.kept if key == "compressed" else {n: {} for n in r.models}
        sizes = counts if key == "compressed" else {n: (dense.params[n], dense.macs[n], 0.0) for n in dense.params}
        one = lambda n, crossing, k=kept: ratios({n: k[n]}, r.blocks, r.cross, crossing)  # type: ignore[misc]
        share = {n: (one(n, False), one(n, True)) for n in r.models}
        sides[key] = side(spec, bundle, measured[key], quality[key], sizes, share, memory(bundle))
    goal, p50 = r.goal, measured["compressed"].latency.p50
    target_ms = goal.milliseconds(measured["baseline"].latency)
    over = unmet(spec, goal, target_ms, sides["compressed"])
    study = open_study(r.folder / "study.journal", spec.seed)
    unique = {t.candidate.key(): t for t in reversed(finished(study))}
    pace = target_ms / fitted.target_ms  # the machine may be slower or faster now than when it was profiled
    trials = [replace(t, latency_ms=pace * predict(t.candidate)) for t in reversed(unique.values())]
    result = search_result(trials, failures(study), target_ms, r.timings.get("search", 0.0))
    r.timings["total"] = sum(v for k, v in r.timings.items() if k != "total")
    summary = Summary(
        spec.name,
        Target(
            target_ms,
            getattr(measured["baseline"].latency, goal.statistic) / target_ms,
            not over,
            spec.target,
            goal.statistic,
            pace * fitted.floor_ms,
            pace * fitted.fixed_ms,
            target_ms if goal.statistic == "p50" else None,
            over,
        ),
        sides["baseline"],
        sides["compressed"],
        measured["baseline"].latency.p50 / p50,
        retained(quality["baseline"], quality["compressed"]),
        pace * fitted.predicted_ms,
        ratios(c.kept, r.blocks, r.cross, False) or 0.0,
        ratios(c.kept, r.blocks, r.cross, True),
        c.kept,
        r.blocks,
        r.cross,
        tuple(proofs),
        result,
        tuple(trials),
        (),
        dict(r.timings),
        plain(spec),
        versions(),
        r.away.cpu if r.away else cpu(),
        spec.seed,
        commit(),
        "mmcompress " + " ".join(sys.argv[1:]),
        r.device,
        peak_mb(),
        losses(r),
        tuple(samples),
        extra,
    )
    summary = replace(summary, warnings=warnings(summary, fitted.attempts))
    write(r.folder / "summary.json", summary)
    return summary


def _latencies(r: Run, pipelines: dict[str, Any], predict: Any, c: Candidate) -> dict[str, Any]:
    """Both sides measured in turn; for another device, what it measured and what is predicted for it."""
    from mmcompress.measure.latency import end_to_end
    from mmcompress.measure.readings import Measured

    if r.away:
        theirs = r.away.baseline  # the correction of a fit to a p95 makes one of every prediction
        factor = theirs.latency.p50 / getattr(theirs.latency, r.goal.statistic)
        medians = replace(predict, correction=predict.correction * factor)
        return {"baseline": theirs, "compressed": _expected(medians, c, theirs)}
    r.say("measure", "baseline and compressed, interleaved", None)
    found = end_to_end(pipelines, r.requests(64), r.spec.measure.warmup, r.spec.measure.rounds)
    return {k: Measured.of(m) for k, m in found.items()}


def losses(r: Run) -> tuple[float, ...]:
    """What training recorded of the loss on choosing pairs, the dense pipeline's first."""
    found: list[float] = []
    for record in sorted(r.folder.glob("distill*.json"), key=lambda p: (p.stem == "distill", p.stem)):
        rows = [row for row in json.loads(record.read_text()) if "choosing" in row]
        found += [row["dense"] for row in rows[:1] if not found] + [row["choosing"] for row in rows]
    return tuple(found)


def _expected(predict: Any, c: Candidate, dense: Any) -> Any:
    """What is predicted of a candidate on another device, in the form of a measurement of no samples."""
    p50, wide = predict(c), dense.latency.p95 / dense.latency.p50
    nodes = {n: predict.node_ms(n, c) for n in predict.placed}
    share = 1 - predict.correction * (predict.overhead_ms + predict.along(predict.around)) / p50
    latency = {n: Latency(ms, ms * wide, 0) for n, ms in nodes.items()}
    return replace(dense, latency=Latency(p50, p50 * wide, 0), nodes=latency, model_share=share)


def _judge(r: Run, pipelines: dict[str, Any], split: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Quality of each bundle over a whole split, and a few captions of both for the eye."""
    from mmcompress.metrics.pairs import ask, judge

    pairs, found, said = r.data.load(split), {}, {}
    dense = None
    for key, pipeline in pipelines.items():  # the baseline first
        answers = ask(pipeline, pairs, lambda share, k=key: r.say("judge", f"{k} on {split}", share), dense)  # type: ignore[misc]
        found[key], said[key] = judge(answers, r.spec.metrics), answers.texts
        dense = dense or answers
    samples = [{"reference": pairs.texts[i], **{k: v[i] for k, v in said.items()}} for i in range(min(8, len(pairs)))]
    return found, samples
