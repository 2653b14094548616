"""`mmcompress show`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mmcompress.cli.options import LocalPath
from mmcompress.cli.results_table import print_path, print_summary
from mmcompress.storage import to_plain
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary


@click.command("show")
@click.argument("folder", type=LocalPath())
@click.option("--json", "as_json", is_flag=True, help="The whole summary as JSON.")
def show_command(folder: str, as_json: bool) -> None:
    """Show the result of a finished run."""
    summary = load_summary(folder)
    if as_json:
        click.echo(json.dumps(to_plain(summary), indent=1))
    else:
        print_summary(summary)
        report = RunFolder(path=Path(folder)).report
        if report.exists():
            print_path("report", report)
