"""Methods side by side on one pipeline and target: the same evidence, evaluations, training and measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcompress.errors import DataError, SpecError
from mmcompress.measure.latency import LEAST, MOST
from mmcompress.measure.predict import Predictor
from mmcompress.metrics.tally import Outcomes, verdict
from mmcompress.records import Candidate, Summary, read, write
from mmcompress.registry import nearest
from mmcompress.report.several import Judged, write_comparison
from mmcompress.spec.loader import load, one_target
from mmcompress.spec.schema import Distill, Spec
from mmcompress.workflow.conclude import summarize
from mmcompress.workflow.dense import REQUESTS, WINDOWS, Profile, prepared
from mmcompress.workflow.fit import Fitted, fit, measure_structure
from mmcompress.workflow.make import compress, trained
from mmcompress.workflow.methods import METHODS, Method
from mmcompress.workflow.state import SILENT, Run, Say, open_run

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

EQUAL = 1.05
"""Latencies of which one is at most so many times the other are equal."""
FOREVER = 1e5
"""Minutes."""
TEACHER = ("embedding", "tokens", "affinity", "logits", "hidden", "cross")
"""Losses that a teacher is needed for."""


def compare(
    spec_path: str | Path,
    out: str | Path,
    methods: Sequence[str] = tuple(METHODS),
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    say: Say = SILENT,
) -> dict[str, Summary]:
    """Every method's summary, in a folder of its own in `out`, and `compare.html` beside them.

    A method that is done is not done again when resumed. Raises `SpecError` for an unknown method or several targets.
    """
    for name in methods:
        if name not in METHODS:
            raise SpecError(f"compare: unknown method '{name}'; {nearest(name, METHODS)}")
    one_target(load(spec_path, overrides))
    r = open_run(spec_path, out, space, overrides, resume, say)
    same_effort(r)
    for name in methods:
        if fixed := METHODS[name].fixed:
            fixed(r)  # what can't be made in this search space is told before hours of work
    suited = [name for name in methods if METHODS[name].suits(r)]
    if methods and not suited:
        raise SpecError(f"compare: '{methods[0]}' is of no use here: {METHODS[methods[0]].needs}")
    methods = suited
    dense, predict, ev = prepared(r)
    wanted = list(dict.fromkeys(m for name in methods for m in (METHODS[name].like, name) if m))
    found: dict[str, Summary] = {}
    steps = 0
    for name in wanted:
        record = r.folder / name / "summary.json"
        if not record.exists():
            say("compare", name, None)
            make(r, name, METHODS[name], predict, ev, dense, steps)
        found[name] = read(Summary, record)
        steps = steps or trained(record.parent)
        write_comparison(found, {n: METHODS[n].about for n in found}, _claims(r, dense, list(found)), r.folder)
    return found


def _claims(r: Run, dense: Profile, methods: Sequence[str]) -> list[Judged]:
    """Of every other method, whether the search keeps more."""
    others = [name for name in methods if name != "searched" and "searched" in methods]
    return [judged(r, dense, f"The search keeps more than '{name}'", ("searched",), (name,)) for name in others]


def judged(
    r: Run, dense: Profile, says: str, better: Sequence[str], worse: Sequence[str], apart: bool = False
) -> Judged:
    """A claim that some cells keep more than others, with its verdict; `apart`: at whatever latency.

    At unequal latency nothing is claimed, but of the side that keeps more and takes no longer.
    """
    tallies = [
        [read(Outcomes, r.folder / name / "outcomes.json").compressed for name in side] for side in (better, worse)
    ]
    said, gap, half = verdict(*tallies)
    if not apart:
        found = side_by_side(r, dense, (*better, *worse))
        more, less = ([found[n] for n in side] for side in ((better, worse) if gap > 0 else (worse, better)))
        low, high = min(found.values()), max(found.values())
        if high > EQUAL * low and not (abs(gap) > half and max(more) <= min(less)):
            said = f"not at equal latency ({low:.1%} and {high:.1%} of the dense pipeline's)"
    return says, said, gap, half


def side_by_side(r: Run, dense: Profile, names: Sequence[str]) -> dict[str, float]:
    """What the artifacts of some cells take, over the dense pipeline, all of them measured in turn; measured once.

    Their summaries were measured minutes apart, and a machine that others use changes its pace meanwhile, by as much
    as is to be told. On another device it is what was predicted; one structure takes what it takes.
    """
    from mmcompress.measure.readings import beside

    fits = {n: read(Fitted, r.folder / n / "fitted.json") for n in names}
    if r.away or len({f.candidate.key() for f in fits.values()}) == 1:
        return {n: f.measured_ms / dense.latency_ms.p50 for n, f in fits.items()}
    record, key, m = r.folder / "beside.json", " ".join(names), r.spec.measure
    known: dict[str, dict[str, float]] = json.loads(record.read_text()) if record.exists() else {}
    if key not in known:
        r.say("measure", f"{', '.join(names)} and the dense pipeline, in turn", None)
        bundles = {"fp32": r.shared / "baseline", **{n: r.folder / n / "bundle" for n in names}}
        how = (dense.said, dense.latency_ms.p50, m.threads, m.warmup, MOST * m.rounds)
        found = beside(bundles, r.requests(REQUESTS), *how, benchmark=r.bench.benchmark_bundles)
        known[key] = {n: found[n].latency.p50 / found["fp32"].latency.p50 for n in names}
        write(record, known)
    return known[key]


def same_effort(r: Run) -> None:
    """Raise `DataError` where a comparison is to go on with more or fewer trials than it was begun with."""
    effort = lambda spec: (spec.search.trials, spec.search.mutations)
    begun = effort(read(Spec, r.folder / "spec.json"))
    if effort(r.spec) != begun:
        raise DataError(
            f"{r.folder}: begun with {begun[0]} trials and {begun[1]} mutations; with others rows would not be equal"
        )


def make(r: Run, name: str, method: Method, predict: Predictor, ev: Evidence, dense: Profile, steps: int = 0) -> None:
    """One method the whole way, in the folder `name`; it leaves a summary.

    `steps`: so many steps of training, however long they take; 0: as long as the spec says.
    """
    folder = r.folder / name
    record = folder / "timings.json"
    timings = json.loads(record.read_text()) if record.exists() else {}
    spec = _brief(r.spec, known=bool(method.like))
    spec = replace(spec, distill=_training(spec.distill, method, steps))
    if method.importance:
        ev = rescored(r, ev, method.importance)
        spec = replace(spec, prune=replace(spec.prune, importance=method.importance))
    run = replace(r, folder=folder, spec=spec, timings=timings)
    if method.fixed is not None:
        fitted = _as_is(run, ev, method.fixed(run), predict, dense)
    elif method.like:
        fitted = read(Fitted, r.folder / method.like / "fitted.json")
        fixed = {n: node.precision for n, node in spec.models().items() if node.precision != "auto"}
        fitted = replace(fitted, candidate=replace(fitted.candidate, precision=fitted.candidate.precision | fixed))
        write(folder / "fitted.json", fitted)
    else:
        assert method.propose is not None
        fitted = fit(run, ev, predict, dense, method=method.propose)
    summarize(run, fitted, dense, *compress(run, ev, fitted, dense, method.scratch))


def _brief(spec: Spec, known: bool) -> Spec:
    """Without what a comparison does not show; a structure of known latency is measured for a tenth of the time."""
    m = spec.measure
    rounds = max(LEAST, m.rounds // MOST) if known else m.rounds
    return replace(
        spec, data=replace(spec.data, report=()), measure=replace(m, memory=False, rounds=min(rounds, m.rounds))
    )


def _training(d: Distill, method: Method, steps: int) -> Distill:
    """How a method is trained: for as many steps as the others, with its losses."""
    if not method.train or not d.steps:
        return replace(d, steps=0)
    if method.alone and (d.contrast or d.caption):
        d = replace(d, **dict.fromkeys(TEACHER, 0.0), caption=d.caption or 1.0)  # type: ignore[arg-type]
    return replace(d, steps=steps, minutes=FOREVER) if steps else d


def _as_is(run: Run, ev: Evidence, candidate: Candidate, predict: Predictor, dense: Profile) -> Fitted:
    ms, target_ms = predict(candidate), run.goal.milliseconds(dense.latency_ms)
    measured = ms if run.away else _measured(run, ev, candidate, dense)
    fitted = Fitted(candidate, ms, measured, target_ms, 0, predict.correction)
    write(run.folder / "fitted.json", fitted)
    return fitted


def _measured(run: Run, ev: Evidence, candidate: Candidate, dense: Profile) -> float:
    return measure_structure(run, ev, candidate, dense).usual_ms(candidate.precision, run.shared / WINDOWS)


def rescored(r: Run, ev: Evidence, importance: str) -> Evidence:
    """The evidence with the scores of another criterion."""
    from mmcompress.prune.importance import Material, scored
    from mmcompress.prune.refit import measure_grams
    from mmcompress.registry import IMPORTANCE

    batch = r.pipeline.batch(r.data.load("train", r.spec.data.calibration))
    if not all(ev.grams.values()):  # they were not needed for the search
        ev = replace(ev, grams=measure_grams(r.pipeline, r.models, batch))
    material = Material(r.pipeline, r.models, batch, ev.grams, r.spec.seed)
    return replace(ev, scores=scored(IMPORTANCE.get(importance), material))
