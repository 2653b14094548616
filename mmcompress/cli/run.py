"""`mmcompress run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mmcompress.cli.console import Progress, out
from mmcompress.cli.options import (
    add_run_options,
    choose_default_folder,
    collect_overrides,
    from_option,
    max_time_option,
    resume_option,
)
from mmcompress.cli.results_table import print_path, print_summary
from mmcompress.errors import QualityUndetermined, TargetNotMet
from mmcompress.results.records import Summary
from mmcompress.run.run_targets import run_targets
from mmcompress.workspace.folder import RunFolder


@click.command("run")
@click.argument("spec", type=click.Path())
@add_run_options
@click.option(
    "--out", "folder", type=click.Path(), help="Run folder (default: runs/NAME-TARGET-sSEED)."
)
@from_option
@max_time_option
@resume_option
def run_command(
    spec: str,
    space: str | None,
    folder: str | None,
    from_run: str | None,
    max_time: str | None,
    resume: bool,
    **options: Any,
) -> None:
    """Compress a pipeline to its target: profile, search, prune, distill, quantize, export,
    measure, report."""
    overrides = collect_overrides(**options)
    folder = folder or choose_default_folder(spec, overrides)
    with Progress() as on_progress:
        summaries = run_targets(
            spec,
            folder,
            space=space,
            overrides=overrides,
            resume=resume,
            from_run=from_run,
            max_time=max_time,
            on_progress=on_progress,
        )
    run_folder = RunFolder(Path(folder))
    for summary in summaries:
        target_folder = run_folder
        if len(summaries) > 1:
            target_folder = run_folder.target_folder(summary.target.text)
        print_summary(summary)
        out.print()
        print_path("report", target_folder.report)
        print_path("bundle", target_folder.bundle)
    if len(summaries) > 1:
        print_path("front", run_folder.front_page)
    _require_met_targets(summaries)
    _require_determined_quality(summaries)


def _require_determined_quality(summaries: Sequence[Summary]) -> None:
    """Raise `QualityUndetermined` when the dense answers tell nothing of what was lost."""
    for summary in summaries:
        reasons = summary.describe_undetermined()
        if reasons:
            raise QualityUndetermined(f"{'; '.join(reasons)}; the pipeline was written")


def _require_met_targets(summaries: Sequence[Summary]) -> None:
    """Raise `TargetNotMet` when a target is missed."""
    misses: list[str] = []
    for summary in summaries:
        if not summary.target.met:
            misses.append(f"{summary.target.text}: {', '.join(summary.target.describe_misses())}")
    if misses:
        raise TargetNotMet(f"{'; '.join(misses)}; the best found was written")
