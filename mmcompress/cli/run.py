"""`mmcompress run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from mmcompress.cli.console import (
    Progress,
    add_progress_options,
    choose_progress_form,
    err,
    out,
    write_event,
)
from mmcompress.cli.options import (
    LocalPath,
    add_run_options,
    choose_default_folder,
    collect_overrides,
    from_option,
    max_time_option,
    resume_option,
)
from mmcompress.cli.results_table import print_path, print_summary, write_result_event
from mmcompress.errors import (
    DataError,
    LimitUndetermined,
    QualityNotRetained,
    QualityUndetermined,
    TargetNotMet,
    TrackingError,
)
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import resolve_entry
from mmcompress.report.trackers.base import Tracker, open_tracker
from mmcompress.results.records import RETAINED_LIMIT, Summary
from mmcompress.spec.storage_urls import is_remote
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import WAIT_OR_CHOOSE, is_held
from mmcompress.workspace.mirror_run import locate_run_folder

RUN_TARGETS = "mmcompress.run.run_targets:run_targets"
"""What does the work. It takes torch, which needs seconds to be imported: a spec that is wrong is
told before."""


@click.command("run")
@click.argument("spec", type=LocalPath())
@add_run_options
@click.option(
    "--out",
    "folder",
    type=click.Path(),
    help="Run folder, or storage URL such as s3://bucket/run (default: runs/NAME-TARGET-sSEED).",
)
@from_option
@max_time_option
@resume_option
@click.option(
    "--track",
    "track_addresses",
    multiple=True,
    metavar="mlflow:URI",
    help="A server that keeps the result: settings, figures, report and bundle.",
)
@add_progress_options
def run_command(
    spec: str,
    space: str | None,
    folder: str | None,
    from_run: str | None,
    max_time: str | None,
    resume: bool,
    track_addresses: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compress a pipeline to its target: profile, search, prune, distill, quantize, export,
    measure, report."""
    overrides = collect_overrides(**options)
    load_spec(spec, overrides)
    folder = folder or choose_default_folder(spec, overrides)
    run_folder = RunFolder(path=locate_run_folder(folder))
    if is_held(run_folder):
        raise DataError(f"{folder}: a process is working on this run: {WAIT_OR_CHOOSE}")
    if not is_remote(folder):
        run_folder.require_free(resume=resume)
    # A server that does not answer is told now, not after the run.
    trackers = [open_tracker(address) for address in track_addresses]
    with Progress(choose_progress_form(as_json, quiet)) as on_progress:
        summaries: Sequence[Summary] = resolve_entry(RUN_TARGETS)(
            spec,
            folder,
            space=space,
            overrides=overrides,
            resume=resume,
            from_run=from_run,
            max_time=max_time,
            on_progress=on_progress,
        )
    for number, summary in enumerate(summaries):
        target_folder = run_folder.get_target_folder(summary.target.text)
        if number == 0 and run_folder.summary.exists():
            # The only target that was asked for; slower ones lie in it.
            target_folder = run_folder
        if as_json:
            write_result_event(summary, target_folder)
        else:
            print_summary(summary)
            out.print()
            _print_place("report", target_folder.report, out=folder)
            _print_place("bundle", target_folder.bundle, out=folder)
        for tracker in trackers:
            _track_result(tracker, summary, folder=target_folder, as_json=as_json)
    if len(summaries) > 1 and not run_folder.summary.exists() and not as_json:
        _print_place("front", run_folder.front_page, out=folder)
    _require_met_targets(summaries)
    _require_determined_limits(summaries)
    _require_determined_quality(summaries)


def _print_place(name: str, path: Path, *, out: str) -> None:
    """Print where something was written: at its storage URL, where the run is kept at one."""
    print_path(name, path)
    if is_remote(out):
        inner_path = path.relative_to(locate_run_folder(out)).as_posix()
        print_path("", f"{out.rstrip('/')}/{inner_path}")


def _track_result(tracker: Tracker, summary: Summary, *, folder: RunFolder, as_json: bool) -> None:
    """Send a result to a tracker. What goes wrong there is told; the result is on disk."""
    try:
        address = tracker.log_result(summary, folder)
    except TrackingError as error:
        err.print(f"the result was not tracked: {escape(str(error))}; --resume sends it again")
        return
    if as_json:
        write_event("tracked", target=summary.target.text, address=address)
    else:
        out.print(f"tracked: {escape(address)}")


def _require_determined_limits(summaries: Sequence[Summary]) -> None:
    """Raise `LimitUndetermined` when what a limit is about could not be measured."""
    for summary in summaries:
        reasons = summary.target.describe_undetermined()
        if reasons:
            raise LimitUndetermined(
                f"{'; '.join(reasons)}; the pipeline was written, and --resume measures it again"
            )


def _require_determined_quality(summaries: Sequence[Summary]) -> None:
    """Raise `QualityUndetermined` when the dense answers tell nothing of what was lost."""
    for summary in summaries:
        reasons = summary.describe_undetermined()
        if reasons:
            raise QualityUndetermined(f"{'; '.join(reasons)}; the pipeline was written")


def _require_met_targets(summaries: Sequence[Summary]) -> None:
    """Raise `TargetNotMet` when a target is missed, or `QualityNotRetained` when too little of the
    dense quality is kept."""
    misses: list[str] = []
    for summary in summaries:
        if not summary.target.met:
            misses.append(f"{summary.target.text}: {', '.join(summary.target.describe_misses())}")
    lost = _describe_lost_quality(summaries)
    if misses:
        raise TargetNotMet(f"{'; '.join([*misses, *lost])}; the best found was written")
    if lost:
        raise QualityNotRetained(f"{'; '.join(lost)}; each of them was written")


def _describe_lost_quality(summaries: Sequence[Summary]) -> list[str]:
    """Return what is kept at which target, in words; nothing where all of them keep enough."""
    reached: list[str] = []
    is_missed = False
    limit = 0.0
    for summary in summaries:
        target = summary.target.text
        retained = summary.retained
        if retained is not None:
            limit = retained.limit
            is_missed = is_missed or not retained.is_kept
            reached.append(f"{retained.choosing.value:.1%} at {target}")
        elif RETAINED_LIMIT in summary.skipped:
            is_missed = True
            reached.append(f"an unknown share at {target} ({summary.skipped[RETAINED_LIMIT]})")
    if not is_missed:
        return []
    asked = f" of {limit:.1%} asked for" if limit else ""
    return [
        f"{RETAINED_LIMIT}: of the dense quality on validation pairs, "
        f"{', '.join(reached)} is kept{asked}"
    ]
