"""`mmcompress watch`."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.markup import escape

from mmcompress.cli.console import (
    Progress,
    add_progress_options,
    choose_progress_form,
    err,
    out,
)
from mmcompress.cli.options import LocalPath
from mmcompress.errors import DataError
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import is_held
from mmcompress.workspace.load_summary import load_summary
from mmcompress.workspace.progress_log import read_progress

SECONDS_BETWEEN_LOOKS = 0.5
"""Seconds after which the folder is looked at again."""

MAX_WAIT_SECONDS = 60.0
"""Seconds that a run may take to write its first line: it imports torch and loads its models."""


@click.command("watch")
@click.argument("folder", metavar="RUN", type=LocalPath())
@click.option("--once", is_flag=True, help="Say where the run is, and end.")
@add_progress_options
def watch_command(folder: str, once: bool, as_json: bool, quiet: bool) -> None:
    """Follow a run that another process works on, from its folder, until it ends."""
    run_folder = RunFolder(path=Path(folder))
    _wait_for_first_line(run_folder, max_seconds=0.0 if once else MAX_WAIT_SECONDS)
    offset = 0
    lines = [line for line, _ in read_progress(run_folder.progress)]
    told_at = lines[0].unix_seconds if lines else time.time()
    form = choose_progress_form(as_json, quiet)
    with Progress(form, read_seconds=lambda: told_at) as on_progress:
        while True:
            # Looked at first: what is written until the end of the run is read after it.
            is_running = is_held(run_folder)
            for line, end in read_progress(run_folder.progress, offset):
                offset = end
                told_at = line.unix_seconds
                on_progress(line.stage, line.message, line.share)
            if once or not is_running:
                on_progress.is_stage_over = not is_running
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if not as_json:
        out.print(escape(_describe_state(run_folder, is_running=is_running)), soft_wrap=True)


def _wait_for_first_line(folder: RunFolder, *, max_seconds: float) -> None:
    """Wait until a run has begun in a folder.

    Raises:
        DataError: None has begun within these seconds.
    """
    end_seconds = time.monotonic() + max_seconds
    if not folder.progress.exists() and max_seconds:
        err.print(
            f"no run has begun in {escape(str(folder))}: waiting up to {max_seconds:.0f} s for one",
            soft_wrap=True,
        )
    while not folder.progress.exists():
        if time.monotonic() >= end_seconds:
            raise DataError(f"{folder}: no run has begun in this folder")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _describe_state(folder: RunFolder, *, is_running: bool) -> str:
    """Return in words whether a run goes on, is finished or was cut off."""
    if is_running:
        return "the run goes on"
    for place in (folder, *folder.list_inner_folders()):
        if place.has_next() or place.has_interrupted_move():
            return (
                "the run was cut off while another artifact was made; the same command with "
                f"--resume goes on. The best one so far lies in {place.bundle}"
            )
    finished = folder.list_finished_subfolders()
    if folder.summary.exists() or finished:
        place = folder if folder.summary.exists() else folder.get_subfolder(finished[-1])
        summary = load_summary(place.path)
        verdict = "met" if summary.target.met else "missed"
        return (
            f"the run is finished: {summary.speedup:.2f}x, the target {summary.target.text} is "
            f"{verdict}; mmcompress show {place} says more"
        )
    return "the run was cut off; the same command with --resume goes on"
