"""`mmcompress doctor`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.errors import ClusterError, DataError, RunDamaged, SpecError
from mmcompress.registry import resolve_entry
from mmcompress.runtime.environment import Finding, check_environment
from mmcompress.search.ray_folder import choose_ray_folder

MARKS = {"good": "[green]good[/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red]"}
"""How the state of a finding is printed."""


@click.command("doctor")
@click.argument("run", required=False, type=LocalPath())
@click.option("--repair", is_flag=True, help="Mend the run folder: a resumed run makes the rest.")
def doctor_command(run: str | None, repair: bool) -> None:
    """Check this machine, or a run folder: what is damaged, or was left behind.

    Without --repair nothing is written. A run that goes on with --resume mends its folder, too.
    """
    if run is not None:
        _check_run(run, repair=repair)
        return
    if repair:
        raise SpecError("--repair takes a run folder")
    findings = [*check_environment(), check_ray_folder()]
    for finding in findings:
        mark = MARKS[finding.state]
        out.print(f"{mark:<22}{finding.name:<11}{escape(finding.detail)}", soft_wrap=True)
    bad = [finding.name for finding in findings if finding.state == "bad"]
    if bad:
        raise DataError(f"this machine can't do the work: {', '.join(bad)}")


def _check_run(run: str, *, repair: bool) -> None:
    """Tell what is wrong with a run folder, or mend it; raises `RunDamaged` where anything is."""
    if not Path(run).is_dir():
        # Told before the seconds that it takes to load what looks into a run.
        raise DataError(f"{run}: there is no such folder")
    inspection = "mmcompress.run.inspect_run"
    if repair:

        def tell(text: str) -> None:
            out.print(escape(text), soft_wrap=True)

        resolve_entry(f"{inspection}:repair_run")(run, tell=tell)
    findings = resolve_entry(f"{inspection}:inspect_run")(run)
    for finding in findings:
        fault = finding.fault.removeprefix(f"{finding.path}: ")
        out.print(f"{MARKS['bad']:<22}{escape(str(finding.path))}: {escape(fault)}")
    if findings:
        cure = "the run's command with --resume makes it again"
        if not repair:
            cure = f"--repair sets aside what is damaged; {cure}"
        count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
        raise RunDamaged(f"{run}: {count}; {cure}")
    out.print(f"{MARKS['good']} {escape(run)}: whole")


def check_ray_folder() -> Finding:
    """Check the folder of Ray's sockets, whose paths a system bounds to some 100 bytes."""
    try:
        folder = choose_ray_folder()
    except ClusterError as error:
        return Finding(name="ray", state="note", detail=str(error))
    return Finding(name="ray", state="good", detail=f"workers keep their sockets in {folder}")
