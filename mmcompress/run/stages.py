"""The order of the stages, and nothing else: each is a function that leaves a record in the run folder.

profile -> evidence -> search -> fit -> compress -> measure -> summary
                         ^        |                    |
                         +--------+--------------------+  a measured miss corrects the prediction, the search goes on

Several targets share profile, predictor and evidence; the rest has a folder for each.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from mmcompress.errors import ClusterError, MmcompressError, SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.report.comparison_pages import write_front
from mmcompress.report.page import write_report
from mmcompress.results.records import Summary
from mmcompress.results.target import corrected_target_share, long_run_target_share, tighten_limits
from mmcompress.run.compress import compress_pipeline
from mmcompress.run.evaluate import evaluate_artifact
from mmcompress.run.fit import FittedStructure, fit_structure
from mmcompress.run.next_artifact import _enough, _within, is_better
from mmcompress.run.prepare import prepare_run
from mmcompress.run.profile import Profile
from mmcompress.runtime.timing import Clock
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.spec.target import split_targets
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import OnProgress, RunContext, ignore_progress, open_run


def run(
    spec_path: str | Path,
    out: str | Path,
    *,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    on_progress: OnProgress = ignore_progress,
    bench: Benchmarker | None = None,
    clock: Clock | None = None,
) -> Summary:
    """Compress a pipeline to its one target: the whole way. Returns the summary; the report is in `out`.

    Raises `SpecError`, `DataError`, `ModelError` for bad input and `ProofFailed` when an artifact is wrong. A target
    that is not met is no exception: `summary.target.met` says so.
    """
    if len(wanted := split_targets(load_spec(spec_path, overrides))) > 1:
        raise SpecError(
            f"run makes one artifact, the spec asks for {len(wanted)}: use mmcompress.run_targets"
        )
    return run_targets(
        spec_path,
        out,
        space=space,
        overrides=overrides,
        resume=resume,
        on_progress=on_progress,
        bench=bench,
        clock=clock,
    )[0]


def run_targets(
    spec_path: str | Path,
    out: str | Path,
    *,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    on_progress: OnProgress = ignore_progress,
    bench: Benchmarker | None = None,
    clock: Clock | None = None,
) -> tuple[Summary, ...]:
    """`run` for every target of the spec; several have a folder each in `out`, and a front beside them.

    What goes wrong with one of several is raised when the others are done.
    """
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
    prepared = prepare_run(r)
    r, dense = prepared.run, prepared.dense
    predict, ev = prepared.predictor, prepared.sensitivity
    wanted = split_targets(r.spec)
    if len(wanted) == 1:
        return (_reach(r, dense, predict=predict, ev=ev),)

    found: dict[str, Summary] = {}
    failed: list[MmcompressError] = []
    for t in wanted:
        try:
            found[t.replace(" ", "-")] = _reach(r.aim_at(t), dense, predict=predict, ev=ev)
        except MmcompressError as e:
            on_progress("run", f"target {t}: {e}", None)
            failed.append(e.with_traceback(None))  # its frames hold models
            if isinstance(e, ClusterError):  # the others would end the same way
                break
    if len(found) > 1:
        write_front(found, r.folder.path)
    if failed:
        raise failed[0]
    return tuple(found.values())


def _reach(r: RunContext, dense: Profile, *, predict: Predictor, ev: Sensitivity) -> Summary:
    """One target: search, make, measure; when the finished artifact misses, once more with what was learnt.

    A limit that it exceeded is searched with lowered by as much. The best so far waits in `earlier/`. What is finished
    is not made or measured again, unless more of a search is asked for, or another device has measured it since.
    """

    kept, record = r.folder.stash, r.folder.fitted
    r.folder.finish_interrupted_move()
    known = read_record(FittedStructure, record) if record.exists() else None
    finished = r.folder.summary.exists() and not r.folder.has_stash()
    asked = r.spec.search.trials + r.spec.search.level_switches
    if (
        finished and known and known.search_effort < asked
    ):  # what is there stays until something better is
        r.folder.discard_short_finetunings()
        r.folder.stash_artifact()
        finished, known = False, None
    bias, limits = known.final_to_fitted if known else 1.0, r.spec.limits
    begun, before = 1, 0
    if r.folder.has_stash():
        first, missed = (
            read_record(FittedStructure, kept.fitted),
            read_record(Summary, kept.summary),
        )
        begun, before = 2 if first.search_effort >= asked else 1, len(first.attempts)
        bias = bias if known else first.next_final_to_fitted(long_run_target_share(missed))
        limits = tighten_limits(limits, limits, side=missed.compressed)
    for done in count(begun):
        fitted = fit_structure(
            _within(r, limits), ev, predict=predict, dense=dense, bias=bias, before=before
        )
        if finished and fitted == known and not r.device_readings and r.folder.has_bundle():
            summary = read_record(Summary, r.folder.summary)
            break
        made = compress_pipeline(
            r, ev, fitted, dense, earlier=kept if r.folder.has_stash() else None
        )
        summary = evaluate_artifact(r, fitted, dense, *made, patient=True)
        told = (
            r.device_readings is not None and summary.compressed.latency_ms.n > 0
        )  # by another device, since
        if (finished and fitted == known and not told) or _enough(
            r, fitted, summary=summary, done=done
        ):
            break
        limits = tighten_limits(limits, r.spec.limits, side=summary.compressed)
        bias, before = (
            fitted.next_final_to_fitted(long_run_target_share(summary)),
            before + len(fitted.attempts),
        )
        r.on_progress(
            "fit",
            f"the finished artifact lies at {corrected_target_share(summary):.1%} of its target: once more",
            None,
        )
        if r.folder.has_stash() and is_better(read_record(Summary, kept.summary), summary):
            r.folder.remove_artifact()
        else:
            r.folder.stash_artifact()
    if r.folder.has_stash():
        earlier = read_record(Summary, kept.summary)
        if is_better(earlier, summary):
            r.folder.restore_stash()
            summary = earlier
            write_record(
                record, replace(read_record(FittedStructure, record), search_effort=asked)
            )  # what was asked for has been tried
        r.folder.discard_stash()
    write_report(summary, r.folder.path)
    return summary
