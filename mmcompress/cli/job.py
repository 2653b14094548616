"""`mmcompress job`: look after a run that was sent to a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from mmcompress.cli.console import err, out
from mmcompress.cli.options import LocalPath, address_option
from mmcompress.cli.watched_process import INTERRUPTED_EXIT_CODE
from mmcompress.registry import resolve_entry

JOBS = "mmcompress.search.jobs"
"""The module that speaks to the job server; only the extra `compress` brings what it needs."""


def add_job_options(command: Any) -> Any:
    """Give a command the id of a job, and the address of its server."""
    return click.argument("job_id", metavar="ID")(address_option(command))


@click.group("job")
def job_command() -> None:
    """Look after a run that `mmcompress submit` sent to a Ray cluster."""


@job_command.command("status")
@add_job_options
def status_command(job_id: str, address: str) -> None:
    """Say whether a job waits, runs or has ended."""
    job = resolve_entry(f"{JOBS}:get_job")(_connect(address), job_id)
    message = f": {job.message}" if job.message else ""
    out.print(escape(f"{job_id} {str(job.status.value).lower()}{message}"))


@job_command.command("logs")
@add_job_options
def logs_command(job_id: str, address: str) -> None:
    """Follow the log of a job from its beginning; exit as its run does."""
    client = _connect(address)
    resolve_entry(f"{JOBS}:get_job")(client, job_id)
    try:
        exit_code = resolve_entry(f"{JOBS}:follow_job")(client, job_id, log=sys.stdout)
    except KeyboardInterrupt:
        err.print(f"job {escape(job_id)} goes on")
        exit_code = INTERRUPTED_EXIT_CODE
    sys.exit(exit_code)


@job_command.command("stop")
@add_job_options
def stop_command(job_id: str, address: str) -> None:
    """Stop a job; the same `submit` goes on with its run."""
    client = _connect(address)
    job = resolve_entry(f"{JOBS}:get_job")(client, job_id)
    if job.status.is_terminal():
        out.print(escape(f"{job_id} has ended already: {str(job.status.value).lower()}"))
        return
    client.stop_job(job_id)
    out.print(escape(f"{job_id} is being stopped; the same `mmcompress submit` goes on"))


@job_command.command("fetch")
@add_job_options
@click.option("--out", "folder", required=True, type=LocalPath(), help="The folder to write.")
def fetch_command(job_id: str, address: str, folder: str) -> None:
    """Copy the run folder of a job, where this machine sees it."""
    fetch_result = resolve_entry(f"{JOBS}:fetch_result")
    fetched = fetch_result(_connect(address), job_id, out=Path(folder))
    out.print(escape(str(fetched)))
    if not resolve_entry(f"{JOBS}:is_fetched_whole")(fetched):
        err.print("[yellow]the run has not ended: this is what it had until now[/yellow]")


def _connect(address: str) -> Any:
    """Connect to a job server."""
    return resolve_entry(f"{JOBS}:connect_to_server")(address)
