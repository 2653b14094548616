"""`mmcompress doctor`."""

from __future__ import annotations

import click
from rich.markup import escape

from mmcompress.cli.console import out
from mmcompress.errors import ClusterError, DataError
from mmcompress.runtime.environment import Finding, check_environment
from mmcompress.search.ray_folder import choose_ray_folder

MARKS = {"good": "[green]good[/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red]"}
"""How the state of a finding is printed."""


@click.command("doctor")
def doctor_command() -> None:
    """Check this machine: versions, processor, memory, disk, Ray."""
    findings = [*check_environment(), check_ray_folder()]
    for finding in findings:
        mark = MARKS[finding.state]
        out.print(f"{mark:<22}{finding.name:<11}{escape(finding.detail)}", soft_wrap=True)
    bad = [finding.name for finding in findings if finding.state == "bad"]
    if bad:
        raise DataError(f"this machine can't do the work: {', '.join(bad)}")


def check_ray_folder() -> Finding:
    """Check the folder of Ray's sockets, whose paths a system bounds to some 100 bytes."""
    try:
        folder = choose_ray_folder()
    except ClusterError as error:
        return Finding(name="ray", state="note", detail=str(error))
    return Finding(name="ray", state="good", detail=f"workers keep their sockets in {folder}")
