"""Compress a pipeline to one target, or to several of them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

from mmcompress.errors import ClusterError, DiskFull, MmcompressError, SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.results.records import Summary
from mmcompress.run.begin_run import begin_run
from mmcompress.run.run_policy import RunPolicy
from mmcompress.run.stages import RunStages, reach_target
from mmcompress.spec.target import split_targets
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder, name_target_folder
from mmcompress.workspace.run_options import RunOptions


def run(
    spec_path: str | Path,
    out: str | Path,
    *,
    policy: RunPolicy | None = None,
    stages: RunStages | None = None,
    **options: Unpack[RunOptions],
) -> Summary:
    """Compress a pipeline to its one target; the report is written into `out`.

    Args: as `run_targets` takes them.

    Returns:
        The summary. A target that is not met raises nothing: `summary.target.met` tells.

    Raises:
        SpecError: The spec is wrong, or has several targets.
        DataError: The data or the run folder do not fit.
        ModelError: A model can't be loaded, or can't be cut as asked.
        ProofFailed: An artifact is wrong.
    """
    targets = split_targets(load_spec(spec_path, options.get("overrides")))
    if len(targets) > 1:
        raise SpecError(
            f"run makes one artifact, the spec asks for {len(targets)}: use mmcompress.run_targets"
        )
    [summary] = run_targets(spec_path, out, policy=policy, stages=stages, **options)
    return summary


def run_targets(
    spec_path: str | Path,
    out: str | Path,
    *,
    policy: RunPolicy | None = None,
    stages: RunStages | None = None,
    **options: Unpack[RunOptions],
) -> tuple[Summary, ...]:
    """Compress a pipeline to every target of its spec.

    Args:
        spec_path: The spec file.
        out: The run folder. Several targets have a folder each in it, and a front beside them.
        policy: Tunables and decisions; by default those of the package.
        stages: What each stage does; by default the stages of the package.
        options: See `RunOptions`.

    Returns:
        The summary of every target, in their order.

    Raises:
        MmcompressError: What went wrong with one of several targets, when the others are done.
    """
    stages = stages or RunStages()
    with begin_run(spec_path, out, **options) as opened:
        prepared = stages.prepare(opened)
        reach = partial(reach_target, prepared=prepared, policy=policy, stages=stages)
        targets = split_targets(opened.spec)
        if len(targets) == 1:
            return (reach(prepared.run),)
        return reach_each_target(
            prepared.run, targets, reach=reach, report_front=stages.report_front
        )


def reach_each_target(
    run: RunContext,
    targets: Sequence[str],
    *,
    reach: Callable[[RunContext], Summary],
    report_front: Callable[[Mapping[str, Summary], RunFolder], object],
) -> tuple[Summary, ...]:
    """Reach every target in a folder of its own, and write the front of those that were reached.

    Args:
        run: The run with everything that the targets share.
        targets: The targets, in the order they are reached.
        reach: Makes the artifact of a run with one target.
        report_front: Writes the page of several targets.

    Raises:
        MmcompressError: The first error of a target, when all others are done. An error of the
            cluster or of the disk is raised without trying the others: they would end the same
            way.
    """
    summaries: dict[str, Summary] = {}
    errors: list[MmcompressError] = []
    for target in targets:
        try:
            summaries[name_target_folder(target)] = reach(run.aim_at(target))
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
