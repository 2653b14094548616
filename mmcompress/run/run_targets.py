"""Compress a pipeline to one target, or to several of them one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, Unpack

from mmcompress.errors import ClusterError, DiskFull, MmcompressError, SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.results.records import Summary
from mmcompress.run.begin_run import begin_run
from mmcompress.run.paced_run import PacedRun
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.run_policy import RunPolicy
from mmcompress.run.slower_targets import add_slower_targets, find_slower_target
from mmcompress.run.stages import RunStages, reach_target, report_summary
from mmcompress.runtime.timing import SystemClock
from mmcompress.spec.durations import parse_max_time
from mmcompress.spec.target import split_targets
from mmcompress.storage import write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder, name_target_folder
from mmcompress.workspace.run_options import RunOptions


def run(
    spec_path: str | Path,
    out: str | Path,
    *,
    policy: RunPolicy | None = None,
    stages: RunStages | None = None,
    max_time: str | None = None,
    **options: Unpack[RunOptions],
) -> Summary:
    """Compress a pipeline to its one target; the report is written into `out`.

    Args:
        spec_path: The spec file.
        out: The run folder. It must be new or empty, unless `resume` is given.
        policy: Tunables and decisions; by default those of the package.
        stages: What each stage does; by default the stages of the package.
        max_time: What the call may take, such as `2h` or `30m`; by default any time.
        options: `space`, `overrides`, `resume`, `on_progress`, `bench`, `clock` and `from_run`; see
            `RunOptions`.

    Returns:
        The summary. A target that is not met raises nothing: `summary.target.met` tells. Where too
        little quality is kept, `summary.retained` tells of the slower targets that were made.

    Raises:
        TypeError: An option has another name.
        SpecError: The spec is wrong or has several targets, or the time is too short.
        DataError: The data or the run folder do not fit.
        ModelError: A model can't be loaded, or can't be cut as asked.
        MissingPackage: An optional package that the spec needs is not installed.
        ClusterError: Ray, its cluster or a worker is gone.
        ProofFailed: An artifact is wrong.
    """
    targets = split_targets(load_spec(spec_path, options.get("overrides")))
    if len(targets) > 1:
        raise SpecError(
            f"run makes one artifact, the spec asks for {len(targets)}: use mmcompress.run_targets"
        )
    summaries = run_targets(
        spec_path, out, policy=policy, stages=stages, max_time=max_time, **options
    )
    return summaries[0]


def run_targets(
    spec_path: str | Path,
    out: str | Path,
    *,
    policy: RunPolicy | None = None,
    stages: RunStages | None = None,
    max_time: str | None = None,
    **options: Unpack[RunOptions],
) -> tuple[Summary, ...]:
    """Compress a pipeline to every target of its spec.

    Args:
        spec_path: The spec file.
        out: The run folder, or a storage URL such as `s3://bucket/run` to keep it at. Several
            targets have a folder each in it, and a front beside them.
        policy: Tunables and decisions; by default those of the package.
        stages: What each stage does; by default the stages of the package.
        options: `space`, `overrides`, `resume`, `on_progress`, `bench` and `clock`; see
            `RunOptions`.

    Returns:
        The summary of every target, in their order. Each is followed by those of the slower targets
        that were made since too little of the dense quality was kept (`limits.retained`).

    Raises:
        TypeError: An option has another name.
        SpecError: The spec is wrong, or the time is too short.
        MmcompressError: What went wrong with one of several targets, when the others are done. For
            one target, what `run` raises.
    """
    max_seconds = parse_max_time(max_time) if max_time else math.inf
    if max_time and load_spec(spec_path, options.get("overrides")).search.deterministic:
        raise SpecError(
            "--max-time ends stages by the clock, so two runs differ: leave it or "
            "search.deterministic out"
        )
    clock = options.get("clock") or SystemClock()
    paced = PacedRun(
        stages=stages or RunStages(),
        policy=policy or RunPolicy(),
        clock=clock,
        start=clock.read_seconds(),
        max_seconds=max_seconds,
    )
    with begin_run(spec_path, out, **options) as opened:
        prepared = paced.prepare(opened)
        make_artifacts = partial(
            reach_target,
            prepared=prepared,
            policy=paced.paced_policy,
            stages=paced.paced_stages,
        )
        reach_all = partial(
            reach_until_retained,
            prepared=prepared,
            reach=partial(paced.reach, reach=make_artifacts),
            write=paced.paced_stages.report,
        )
        targets = split_targets(opened.spec)
        if len(targets) == 1:
            reached: dict[str, Summary] = {}
            reach_all(prepared.run, reached=reached)
            return tuple(reached.values())
        return reach_each_target(
            prepared.run,
            targets,
            reach=reach_all,
            report_front=paced.paced_stages.report_front,
        )


class ReachTarget(Protocol):
    """Reaches one target, and slower ones if too little of the dense quality is kept."""

    def __call__(self, run: RunContext, *, reached: dict[str, Summary]) -> None:
        """Make artifacts, and add their summaries to `reached` by the folder of the target."""
        ...


def reach_until_retained(
    run: RunContext,
    *,
    prepared: PreparedRun,
    reach: Callable[[RunContext], Summary],
    write: Callable[[Summary, Path], Path],
    reached: dict[str, Summary],
) -> None:
    """Reach a target, then slower ones as long as too little of the dense quality is kept.

    Slower targets lie beside each other in the folder that the targets share. The summary and the
    report of the first one tell of them.

    Args:
        run: The run with one target.
        prepared: What the targets share.
        reach: Makes the artifact of a run with one target.
        write: Writes the report of a summary into a folder.
        reached: Results by folder of the target; one that is there is not made again. Each result
            is added as soon as it stands.
    """
    root = replace(run, folder=run.shared)
    target: str | None = run.spec.target
    tried: list[Summary] = []
    while target is not None:
        name = name_target_folder(target)
        if name not in reached:
            reached[name] = reach(root.aim_at(target) if tried else run)
        tried.append(reached[name])
        target = find_slower_target(tried, dense=prepared.dense.latency_ms)
        if target is not None:
            _tell_slower_target(run, tried[-1], slower=target)
    first = tried[0]
    complete = add_slower_targets(first, tried[1:])
    if complete != first:
        write_record(run.folder.summary, complete)
        report_summary(run, complete, write=write)
        reached[name_target_folder(run.spec.target)] = complete


def _tell_slower_target(run: RunContext, summary: Summary, *, slower: str) -> None:
    """Tell a person that the run goes on with a slower target, and why."""
    retained = summary.retained
    if retained is None:
        return
    run.on_progress(
        "run",
        f"target {summary.target.text}: {retained.choosing.value:.1%} of the dense quality is kept "
        f"on validation pairs, {retained.limit:.1%} is asked for: the run goes on with {slower}",
        None,
    )


def reach_each_target(
    run: RunContext,
    targets: Sequence[str],
    *,
    reach: ReachTarget,
    report_front: Callable[[Mapping[str, Summary], RunFolder], object],
) -> tuple[Summary, ...]:
    """Reach every target in a folder of its own, and write the front of those that were reached.

    Args:
        run: The run with everything that the targets share.
        targets: The targets, in the order they are reached.
        reach: Reaches one target, and slower ones where it must.
        report_front: Writes the page of several targets.

    Returns:
        The summaries, in the order of the targets.

    Raises:
        MmcompressError: The first error of a target, when all others are done. An error of the
            cluster or of the disk is raised without trying the others: they would end the same
            way.
    """
    summaries: dict[str, Summary] = {}
    errors: list[MmcompressError] = []
    for target in targets:
        try:
            reach(run.aim_at(target), reached=summaries)
        except MmcompressError as error:
            run.on_progress("run", f"target {target}: {error}", None)
            # The frames of the traceback hold models.
            errors.append(error.with_traceback(None))
            if isinstance(error, ClusterError | DiskFull):
                break
    if len(summaries) > 1:
        _write_front(run, summaries, write=report_front)
    if errors:
        raise errors[0]
    return tuple(summaries.values())


def _write_front(
    run: RunContext,
    summaries: Mapping[str, Summary],
    *,
    write: Callable[[Mapping[str, Summary], RunFolder], object],
) -> None:
    """Write the page of several targets. An error there costs nothing: each has its own report."""
    try:
        write(summaries, run.folder)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        run.on_progress(
            "report",
            f"{run.folder.front_page} could not be written ({message}); everything else is done, "
            "and the same command with --resume writes it",
            None,
        )
