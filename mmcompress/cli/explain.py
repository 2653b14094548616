"""`mmcompress explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmcompress.cli.options import (
    LocalPath,
    check_max_time,
    choose_default_folder,
    collect_overrides,
    effort_option,
    name_profile_folder,
    set_option,
    space_option,
    target_option,
)
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import resolve_entry
from mmcompress.workspace.folder import RunFolder

EXPLAIN_SPEC = "mmcompress.cli.explain_tables:explain_spec"
"""What does the work; it takes torch."""


@click.command("explain")
@click.argument("spec", type=LocalPath())
@space_option
@target_option
@effort_option
@click.option(
    "--run",
    "folder",
    type=LocalPath(),
    help="A run or a profile, whose measured milliseconds are used (default: that of this spec in "
    "runs/, if there is one).",
)
@click.option("--measure", is_flag=True, help="Export the dense pipeline and measure it first.")
@click.option(
    "--max-time",
    metavar="2h",
    callback=check_max_time,
    help="Tell, too, what a run with this --max-time would cut.",
)
@set_option
def explain_command(
    spec: str,
    space: str | None,
    target: str | None,
    effort: str | None,
    folder: str | None,
    measure: bool,
    max_time: str | None,
    settings: tuple[str, ...],
) -> None:
    """Tell what a run would do: the graph, what may be cut, what is protected, what it takes.

    Nothing is trained or kept. Some steps are timed for a few seconds.
    """
    overrides = collect_overrides(settings, target=target, effort=effort)
    load_spec(spec, overrides)
    resolve_entry(EXPLAIN_SPEC)(
        spec,
        space=space,
        folder=folder or find_profiled_folder(spec, overrides),
        measure=measure,
        max_time=max_time,
        overrides=overrides,
    )


def find_profiled_folder(spec: str, overrides: dict[str, Any]) -> str | None:
    """Find a folder that a command made for this spec by default and that holds a profile."""
    folders = [choose_default_folder(spec, overrides), name_profile_folder(spec, overrides)]
    for folder in folders:
        if RunFolder(path=Path(folder)).profile.exists():
            return folder
    return None
