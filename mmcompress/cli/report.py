"""`mmcompress report`."""

from __future__ import annotations

from pathlib import Path

import click

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.errors import TargetNotMet
from mmcompress.registry import resolve_entry
from mmcompress.workspace.load_summary import load_summary

WRITE_REPORT = "mmcompress.report.page:write_report"
"""Draws the pages; it takes Altair."""

ADOPT_MEASUREMENTS = "mmcompress.run.adopt_artifacts:adopt_measurements"
"""Takes the figures of another device over, and draws the pages."""


@click.command("report")
@click.argument("folder", type=LocalPath())
@click.option(
    "--measured",
    type=LocalPath(),
    help="Figures of `device check`: they take the place of predicted ones.",
)
def report_command(folder: str, measured: str | None) -> None:
    """Write the report of a finished run again; figures that miss the target end with exit code
    3."""
    if not measured:
        page = resolve_entry(WRITE_REPORT)(load_summary(folder), folder)
        out.print(str(page), soft_wrap=True)
        return
    page = resolve_entry(ADOPT_MEASUREMENTS)(Path(folder), Path(measured))
    out.print(str(page), soft_wrap=True)
    misses = load_summary(folder).target.describe_misses()
    if misses:
        advice = "the same run with --resume goes on from what was measured"
        raise TargetNotMet(f"{', '.join(misses)}; {advice}")
