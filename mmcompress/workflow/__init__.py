"""The order of the stages, and nothing else: each is a function that leaves a record in the run folder.

profile -> evidence -> search -> fit -> compress -> measure -> summary
                         ^        |                    |
                         +--------+--------------------+  a measured miss corrects the prediction, the search goes on

Several targets share profile, predictor and evidence; the rest has a folder for each.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcompress.errors import ClusterError, MmcompressError, SpecError
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.bounds import (
    corrected_target_share,
    is_out_of_reach,
    long_run_target_share,
    target_share,
    tighten_limits,
    worst_limit_ratio,
)
from mmcompress.measure.predict import Predictor
from mmcompress.records import Summary, read_record, write_record
from mmcompress.runtime.timing import Clock
from mmcompress.spec.loader import load_spec, split_targets
from mmcompress.spec.schema import Limits
from mmcompress.workflow import aside
from mmcompress.workflow.conclude import evaluate_artifact
from mmcompress.workflow.dense import Profile, build_predictor, prepare_run, profile_pipeline, write_kit
from mmcompress.workflow.fit import MIN_TARGET_SHARE, FittedStructure, fit_structure
from mmcompress.workflow.make import compress_pipeline
from mmcompress.workflow.state import OnProgress, RunContext, default_space, ignore_progress, open_run

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Sensitivity

__all__ = ["build_predictor", "default_space", "open_run", "profile_pipeline", "run", "run_targets", "write_kit"]


def run(
    spec_path: str | Path,
    out: str | Path,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    say: OnProgress = ignore_progress,
    *,
    bench: Benchmarker | None = None,
    clock: Clock | None = None,
) -> Summary:
    """Compress a pipeline to its one target: the whole way. Returns the summary; the report is in `out`.

    Raises `SpecError`, `DataError`, `ModelError` for bad input and `ProofFailed` when an artifact is wrong. A target
    that is not met is no exception: `summary.target.met` says so.
    """
    if len(wanted := split_targets(load_spec(spec_path, overrides))) > 1:
        raise SpecError(f"run makes one artifact, the spec asks for {len(wanted)}: use mmcompress.run_targets")
    return run_targets(spec_path, out, space, overrides, resume, say, bench=bench, clock=clock)[0]


def run_targets(
    spec_path: str | Path,
    out: str | Path,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    say: OnProgress = ignore_progress,
    *,
    bench: Benchmarker | None = None,
    clock: Clock | None = None,
) -> tuple[Summary, ...]:
    """`run` for every target of the spec; several have a folder each in `out`, and a front beside them.

    What goes wrong with one of several is raised when the others are done.
    """
    r = open_run(spec_path, out, space, overrides, resume, say, bench=bench, clock=clock)
    dense, predict, ev = prepare_run(r)
    wanted = split_targets(r.spec)
    if len(wanted) == 1:
        return (_reach(r, dense, predict, ev),)
    from mmcompress.report.several import write_front

    found: dict[str, Summary] = {}
    failed: list[MmcompressError] = []
    for t in wanted:
        try:
            found[t.replace(" ", "-")] = _reach(r.aimed_at(t), dense, predict, ev)
        except MmcompressError as e:
            say("run", f"target {t}: {e}", None)
            failed.append(e.with_traceback(None))  # its frames hold models
            if isinstance(e, ClusterError):  # the others would end the same way
                break
    if len(found) > 1:
        write_front(found, r.folder)
    if failed:
        raise failed[0]
    return tuple(found.values())


def _reach(r: RunContext, dense: Profile, predict: Predictor, ev: Sensitivity) -> Summary:
    """One target: search, make, measure; when the finished artifact misses, once more with what was learnt.

    A limit that it exceeded is searched with lowered by as much. The best so far waits in `earlier/`. What is finished
    is not made or measured again, unless more of a search is asked for, or another device has measured it since.
    """
    from mmcompress.report import write_report

    kept, record = r.folder / aside.STASH, r.folder / "fitted.json"
    aside.finish_interrupted_move(r.folder)
    known = read_record(FittedStructure, record) if record.exists() else None
    finished = (r.folder / "summary.json").exists() and not kept.exists()
    asked = r.spec.search.trials + r.spec.search.level_switches
    if finished and known and known.search_effort < asked:  # what is there stays until something better is
        (r.folder / "tryouts.json").unlink(missing_ok=True)
        aside.stash_artifact(r.folder)
        finished, known = False, None
    bias, limits = known.final_to_fitted if known else 1.0, r.spec.limits
    begun, before = 1, 0
    if kept.exists():
        first, missed = read_record(FittedStructure, kept / "fitted.json"), read_record(Summary, kept / "summary.json")
        begun, before = 2 if first.search_effort >= asked else 1, len(first.attempts)
        bias = bias if known else first.next_final_to_fitted(long_run_target_share(missed))
        limits = tighten_limits(limits, limits, missed.compressed)
    for done in count(begun):
        fitted = fit_structure(_within(r, limits), ev, predict, dense, bias, before=before)
        if finished and fitted == known and not r.device_readings and (r.folder / "bundle" / "manifest.json").exists():
            summary = read_record(Summary, r.folder / "summary.json")
            break
        made = compress_pipeline(r, ev, fitted, dense, earlier=kept if kept.exists() else None)
        summary = evaluate_artifact(r, fitted, dense, *made, patient=True)
        told = r.device_readings is not None and summary.compressed.latency_ms.n > 0  # by another device, since
        if (finished and fitted == known and not told) or _enough(r, fitted, summary, done):
            break
        limits = tighten_limits(limits, r.spec.limits, summary.compressed)
        bias, before = fitted.next_final_to_fitted(long_run_target_share(summary)), before + len(fitted.attempts)
        r.on_progress(
            "fit", f"the finished artifact lies at {corrected_target_share(summary):.1%} of its target: once more", None
        )
        if kept.exists() and is_better(read_record(Summary, kept / "summary.json"), summary):
            aside.remove_artifact(r.folder)
        else:
            aside.stash_artifact(r.folder)
    if kept.exists():
        earlier = read_record(Summary, kept / "summary.json")
        if is_better(earlier, summary):
            aside.unstash_artifact(r.folder)
            summary = earlier
            write_record(
                record, replace(read_record(FittedStructure, record), search_effort=asked)
            )  # what was asked for has been tried
        shutil.rmtree(kept, ignore_errors=True)
    write_report(summary, r.folder)
    return summary


def _enough(r: RunContext, fitted: FittedStructure, summary: Summary, done: int) -> bool:
    """Whether an artifact ends the rounds, `done` of them: it lies just within its bounds, or as near as it was meant
    to; nothing in the search space is predicted to meet them; or none is left. A miss is tried again in any case."""
    limits, side, target = r.spec.limits, summary.compressed, summary.target
    reached, over = corrected_target_share(summary), worst_limit_ratio(limits, side)
    if max(reached, over) <= 1:
        return (
            reached >= MIN_TARGET_SHARE or fitted.aimed_share < MIN_TARGET_SHARE or done >= r.spec.search.max_artifacts
        )
    hopeless = over > 1 and is_out_of_reach(limits, side, target.lowest_reachable)
    return (
        hopeless or (reached > 1 and target.floor_ms > target.latency_ms) or done >= max(r.spec.search.max_artifacts, 2)
    )


def _within(r: RunContext, limits: Limits) -> RunContext:
    """The run under lower limits than it was asked for."""
    return r if limits == r.spec.limits else replace(r, spec=replace(r.spec, limits=limits))


def is_better(one: Summary, other: Summary) -> bool:
    """Whether one of two artifacts for a target is to be kept.

    What meets it comes first. Of two that do it is the one that is faster and lost no more, if one is both; else the
    one that uses up its target; then the one that lost less. Of two that don't it is the one that came nearer.
    """
    if one.target.met != other.target.met or not one.target.met:
        return one.target.met or (not other.target.met and target_share(one) < target_share(other))
    lost = [s.validation_losses[-1] if s.validation_losses else 0.0 for s in (one, other)]
    quicker, milder = target_share(one) - target_share(other), lost[0] - lost[1]
    if quicker * milder > 0:  # faster and milder, or neither
        return quicker < 0
    near = [corrected_target_share(s) >= MIN_TARGET_SHARE for s in (one, other)]
    return near[0] if near[0] != near[1] else milder < 0
