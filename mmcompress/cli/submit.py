"""`mmcompress submit`."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click
from rich.markup import escape

from mmcompress.cli.console import err
from mmcompress.cli.options import LocalPath, add_run_options, address_option, collect_overrides
from mmcompress.cli.program_name import name_program
from mmcompress.cli.watched_process import INTERRUPTED_EXIT_CODE
from mmcompress.graph.load_spec import load_document, load_spec
from mmcompress.registry import resolve_entry
from mmcompress.runtime.addresses import hide_password
from mmcompress.spec.space import find_default_space


@click.command("submit")
@click.argument("spec", type=LocalPath())
@address_option
@click.option(
    "--out",
    "folder",
    required=True,
    type=click.Path(),
    help="Run folder on storage that the cluster sees, or storage URL such as s3://bucket/run.",
)
@click.option(
    "--resume",
    is_flag=True,
    expose_value=False,
    help="Taken for granted: a job goes on with the run in its folder.",
)
@add_run_options
def submit_command(spec: str, address: str, folder: str, space: str | None, **options: Any) -> None:
    """Run the same command as a job on a Ray cluster; follow its log until it ends."""
    overrides = collect_overrides(**options) | {"search.ray_address": "auto"}
    loaded = load_spec(spec, overrides)
    document = load_document(spec, overrides)
    # Its help is for every install, but only `compress` brings Ray.
    submit_run = resolve_entry("mmcompress.search.jobs:submit_run")
    for missing in resolve_entry("mmcompress.search.jobs:list_missing_folders")(document):
        err.print(f"[yellow]warning:[/yellow] {escape(missing)}: not seen from here")
    sent_jobs: list[str] = []
    try:
        exit_code: int = submit_run(
            document,
            address,
            folder=folder,
            space=space or find_default_space(),
            log=sys.stdout,
            tell_job=sent_jobs.append,
            runtime_env=loaded.cluster.runtime_env,
            sent_as=hide_password(shlex.join([name_program(), *sys.argv[1:]])),
        )
    except KeyboardInterrupt:
        if not sent_jobs:
            raise
        _leave_or_stop(sent_jobs[0], address)
        sys.exit(INTERRUPTED_EXIT_CODE)
    if exit_code:
        sys.exit(exit_code)


def _leave_or_stop(job_id: str, address: str) -> None:
    """Ask what becomes of a job that is no longer followed; without a terminal it goes on."""
    if sys.stdin.isatty() and click.confirm(f"\nStop job {job_id}? Otherwise it goes on"):
        resolve_entry("mmcompress.search.jobs:connect_to_server")(address).stop_job(job_id)
        err.print(f"job {job_id} is being stopped; the same command goes on with its run")
        return
    shown_address = escape(hide_password(address))
    err.print(
        f"job {job_id} goes on; to stop it: mmcompress job stop {job_id} --address {shown_address}"
    )
