"""Stage: measure and judge both bundles, and put everything in one record."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.measure.apart import reloaded
from mmcompress.measure.latency import MOST, EndToEnd, Samples, lasting, loads, spare
from mmcompress.measure.predict import Predictor
from mmcompress.metrics.tally import Tally, quality
from mmcompress.records import (
    Candidate,
    Kept,
    Latency,
    Proof,
    Quality,
    SearchResult,
    Side,
    Summary,
    Target,
    Trial,
    plain,
    read,
    write,
)
from mmcompress.workflow.dense import REQUESTS, WINDOWS, Profile
from mmcompress.workflow.fit import NEAR, Fitted, whole
from mmcompress.workflow.make import Counts
from mmcompress.workflow.relinearize import beliefs
from mmcompress.workflow.state import Run

MORE, PAUSE = 3, 15.0
"""Sittings, and seconds before each, that are added where an artifact seems to lie elsewhere: all of them, for to stop
as soon as it seems to hit would make it more likely to."""


def summarize(
    r: Run, fitted: Fitted, dense: Profile, counts: Counts, proofs: list[Proof], patient: bool = False
) -> Summary:
    """Measure both bundles interleaved, judge both on the full test split, and put everything in one record.

    `patient`: what seems to miss the target is measured for longer.
    """
    from mmcompress.measure.footprint import peak_mb
    from mmcompress.measure.machine import commit, cpu, versions
    from mmcompress.metrics.pairs import retained
    from mmcompress.prune.allocation import ratios
    from mmcompress.report.assemble import warnings
    from mmcompress.report.measured import kept

    spec, c = r.spec, fitted.candidate
    made = read(Predictor, r.shared / "predictor.json")
    predict = replace(made, correction=fitted.correction, tail=r.goal.tail(dense.latency_ms), spared=r.spared)
    beside = {} if r.away else whole(r, c, dense)
    sitting = lambda before: _sitting(r, dense.latency_ms.p50, beside, before)
    splits, said, sittings = ("test", *spec.data.report), {}, [sitting([])]
    for split in splits:
        with r.timed("judge"):
            said[split] = _judge(r, split)
        sittings.append(sitting(sittings))
    elsewhere = patient and not r.away and spare(dense.latency_ms.p50) and not NEAR <= _share(r, sittings) <= 1
    for _ in range(MORE if elsewhere else 0):
        r.clock.sleep(PAUSE)
        sittings.append(sitting(sittings))
    measured = _latencies(r, sittings, predict, c)
    usual = _usual(r, sittings, c) if beside and r.goal.kind == "speedup" else 1.0
    figures = _figures(said["test"])
    extra = {split: _figures(said[split]) for split in spec.data.report}
    sides = _sides(r, c, dense, counts, measured, figures)
    target_ms = r.goal.milliseconds(measured["baseline"].latency)
    pace = target_ms / fitted.target_ms  # the machine may be slower or faster now than when it was profiled
    trials, result = _trials(r, predict, target_ms, pace)
    r.timings["total"] = sum(v for k, v in r.timings.items() if k != "total")
    summary = Summary(
        pipeline=spec.name,
        target=_target(r, fitted, measured["baseline"].latency, sides["compressed"], target_ms, pace),
        baseline=sides["baseline"],
        compressed=sides["compressed"],
        speedup=measured["baseline"].latency.p50 / measured["compressed"].latency.p50,
        quality_retained=retained(figures["baseline"], figures["compressed"]),
        predicted_latency_ms_p50=pace * fitted.predicted_ms,
        unimodal_ratio=ratios(c.kept, r.blocks, r.cross, False) or 0.0,
        cross_modal_ratio=ratios(c.kept, r.blocks, r.cross, True),
        kept=c.kept,
        blocks=r.blocks,
        modality=r.cross,
        proofs=tuple(proofs),
        search=result,
        trials=trials,
        warnings=(),
        timings=dict(r.timings),
        settings=plain(spec),
        versions=versions(),
        cpu=r.away.cpu if r.away else cpu(),
        seed=spec.seed,
        commit=commit(),
        command="mmcompress " + " ".join(sys.argv[1:]),
        device=r.device,
        peak_mb=peak_mb(),
        losses=losses(r),
        samples=_samples(r, said["test"], "test"),
        quality_extra=extra,
        attempts=fitted.attempts,
        sittings=len(sittings),
        usual=usual,
        meant=fitted.meant,
    )
    write(r.folder / "outcomes.json", {k: s.tallies for k, s in said["test"].items()}, indent=None)
    summary = kept(replace(summary, warnings=warnings(summary)), r.folder)
    write(r.folder / "summary.json", summary)
    return summary


def _bundles(r: Run) -> dict[str, Path]:
    return {"baseline": r.shared / "baseline", "compressed": r.folder / "bundle"}


def _sides(
    r: Run, c: Candidate, dense: Profile, counts: Counts, measured: dict[str, Any], quality: dict[str, Any]
) -> dict[str, Side]:
    """Each bundle with its latency, quality, sizes and memory."""
    from mmcompress.prune.allocation import ratios
    from mmcompress.report.assemble import side

    sizes = {"baseline": {n: (dense.params[n], dense.macs[n], 0.0) for n in dense.params}, "compressed": counts}
    kept: dict[str, dict[str, Kept]] = {"baseline": {n: {} for n in r.models}, "compressed": c.kept}
    of = lambda k, n, crossing: ratios({n: kept[k][n]}, r.blocks, r.cross, crossing)
    asked = r.spec.measure.memory or r.spec.limits.memory_mb is not None
    found = {}
    for k, bundle in _bundles(r).items():
        shares = {n: (of(k, n, False), of(k, n, True)) for n in r.models}
        memory = r.bench.measure_memory_mb(bundle) if asked else 0.0
        found[k] = side(r.spec, bundle, measured[k], quality[k], sizes[k], shares, memory)
    return found


def _target(r: Run, fitted: Fitted, dense: Latency, compressed: Side, target_ms: float, pace: float) -> Target:
    from mmcompress.measure.bounds import at_pace, unmet

    over = unmet(r.spec, r.goal, target_ms, compressed)
    return Target(
        latency_ms=target_ms,
        speedup=getattr(dense, r.goal.statistic) / target_ms,
        met=not over,
        asked=r.spec.target,
        statistic=r.goal.statistic,
        floor_ms=pace * fitted.floor_ms,
        fixed_ms=pace * fitted.fixed_ms,
        fixed={n: pace * ms for n, ms in fitted.fixed.items()},
        lowest=at_pace(fitted.lowest, pace),
        latency_ms_p50=target_ms if r.goal.statistic == "p50" else None,
        unmet=over,
    )


def _trials(r: Run, predict: Predictor, target_ms: float, pace: float) -> tuple[tuple[Trial, ...], SearchResult]:
    """Every architecture that was tried, once, at the predictor's last word on it."""
    from mmcompress.report.assemble import search_result
    from mmcompress.search.study import failures, finished, open_study

    study = open_study(r.folder / "study.journal", r.spec.seed)
    unique = {t.candidate.key(): t for t in reversed(finished(study))}
    trials = tuple(replace(t, latency_ms=pace * predict(t.candidate)) for t in reversed(unique.values()))
    found, known = search_result(trials, failures(study), target_ms, r.timings.get("search", 0.0)), beliefs(r.folder)
    return trials, replace(found, splits=known.losses, judged=known.judged)


def _sitting(r: Run, dense_ms: float, beside: dict[str, Path], before: list[dict[str, Samples]]) -> dict[str, Samples]:
    """Both sides measured in turn for a while, and what is to be measured `beside` them, going on where the sittings
    before ended; nothing for another device.

    Loads last as long as those of a fit: in one of three seconds a small pipeline seems 1 to 2 % quicker beside a large
    one than in one of eight. There is one sitting before and one after every split that is judged: a machine
    that others use is faster and slower by the minute, and not equally so for a large model and a small one.
    """
    m, part = r.spec.measure, 2 + len(r.spec.data.report)
    if r.away:
        return {}
    share = (1 + len(beside) / 2) / part
    seconds, loaded = share * lasting(dense_ms), max(1, round(share * loads(dense_ms)))
    r.say("measure", "baseline and compressed, interleaved", None)
    with r.timed("measure"):
        least = -(-m.rounds // part)
        sent = sum(len(s["baseline"].ms) for s in before)
        how = (m.warmup, MOST * least, (), seconds, least, sent, loaded)
        at = {**_bundles(r), **beside}
        return reloaded(at, m.threads, r.requests(REQUESTS), *how, benchmark=r.bench.benchmark_bundles)


def _latencies(r: Run, sittings: list[dict[str, Samples]], predict: Predictor, c: Candidate) -> dict[str, Any]:
    """What was measured in all sittings; for another device, what it measured and what is predicted for it."""
    from mmcompress.measure.readings import Measured

    if r.away:
        theirs = r.away.baseline
        return {"baseline": theirs, "compressed": _expected(replace(predict, tail=1.0), c, theirs)}
    return {k: Measured.of(m) for k, m in _together(sittings).items()}


def _together(sittings: list[dict[str, Samples]]) -> dict[str, EndToEnd]:
    return {k: sum((s[k] for s in sittings), Samples()).summary() for k in sittings[0]}


def _usual(r: Run, sittings: list[dict[str, Samples]], c: Candidate) -> float:
    """The factor from what the artifact took in all sittings to what it takes usually: see `measure.anchors`."""
    from mmcompress.measure import anchors

    found = _together(sittings)
    new = {n: ms.p50 for n, ms in found.pop("compressed").nodes.items()}
    dense = found.pop("baseline")
    # not put on record: there everything is dictated, here it writes freely
    return anchors.steadied(new, c.precision, anchors.together(r.shared / WINDOWS, {anchors.DENSE: dense, **found}))


def _share(r: Run, sittings: list[dict[str, Samples]]) -> float:
    """What the artifact took so far, over what it may take."""
    found = _together(sittings)
    return float(
        getattr(found["compressed"].latency, r.goal.statistic) / r.goal.milliseconds(found["baseline"].latency)
    )


def losses(r: Run) -> tuple[float, ...]:
    """What training recorded of the loss on choosing pairs, the dense pipeline's first."""
    found: list[float] = []
    number = lambda p: int(p.stem.partition("-")[2] or sys.maxsize)
    for record in sorted(r.folder.glob("distill*.json"), key=number):
        rows = [row for row in json.loads(record.read_text()) if "choosing" in row]
        found += [row["dense"] for row in rows[:1] if not found] + [row["choosing"] for row in rows]
    return tuple(found)


def _expected(predict: Predictor, c: Candidate, dense: Any) -> Any:
    """What is predicted of a candidate on another device, in the form of a measurement of no samples."""
    p50, wide = predict(c), dense.latency.p95 / dense.latency.p50
    nodes = {n: predict.node_ms(n, c) for n in predict.placed}
    share = 1 - predict.correction * (predict.overhead_ms + predict.along(predict.around)) / p50
    latency = {n: Latency(ms, ms * wide, 0) for n, ms in nodes.items()}
    return replace(dense, latency=Latency(p50, p50 * wide, 0), nodes=latency, model_share=share)


@dataclass(frozen=True)
class Said:
    """What one side said to a split, and what the metrics count of it."""

    tallies: dict[str, Tally]
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    vectors: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, answers: Any, metrics: tuple[str, ...]) -> Said:
        from mmcompress.metrics.pairs import judge

        vectors = answers.vectors.tolist() if "embedding" in metrics else ()
        return cls(judge(answers, metrics), answers.texts, answers.answers, vectors)


def _judge(r: Run, split: str) -> dict[str, Said]:
    """Ask each bundle a whole split, both at once. The dense one answers once for all that is compared to it."""
    from mmcompress.graph.topology import unjudged
    from mmcompress.metrics.pairs import Answers, ask
    from mmcompress.runtime import load

    pairs, record = r.data.load(split), r.shared / f"dense-{split}.json"
    found = {"baseline": read(Said, record)} if record.exists() else {}
    with ThreadPoolExecutor() as pool:
        tell = lambda key: lambda share: r.say("judge", f"{key} on {split}", share)
        pipelines = {k: load(at, r.spec.measure.threads) for k, at in _bundles(r).items() if k not in found}
        waiting = {k: pool.submit(ask, p, pairs, tell(k), unjudged(r.spec)) for k, p in pipelines.items()}
        asked = {k: w.result() for k, w in waiting.items()}
    if "baseline" not in found:
        theirs = asked["baseline"]
        found["baseline"] = Said.of(theirs, r.spec.metrics)
        write(record, found["baseline"], indent=None)
    dense = found["baseline"]
    beside = Answers(dense.texts, pairs.texts, dense.answers, vectors=np.array(dense.vectors))
    return {**found, "compressed": Said.of(replace(asked["compressed"], dense=beside), r.spec.metrics)}


def _samples(r: Run, said: dict[str, Said], split: str) -> tuple[dict[str, str], ...]:
    """A few texts of both sides for the eye."""
    references = r.data.load(split).texts[:8]
    return tuple({"reference": t, **{k: s.texts[i] for k, s in said.items()}} for i, t in enumerate(references))


def _figures(said: dict[str, Said]) -> dict[str, dict[str, Quality]]:
    return {side: {name: quality(t) for name, t in s.tallies.items()} for side, s in said.items()}
