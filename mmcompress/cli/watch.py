"""`mmcompress watch`."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.markup import escape

from mmcompress.cli.console import (
    Progress,
    ProgressForm,
    add_progress_options,
    choose_progress_form,
    err,
    out,
)
from mmcompress.errors import DataError
from mmcompress.spec.storage_urls import is_remote
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary
from mmcompress.workspace.progress_log import read_progress
from mmcompress.workspace.watched_run import WatchedRun, open_watched_run

MAX_WAIT_SECONDS = 60.0
"""Seconds that a run may take to write its first line: it imports torch and loads its models."""


@click.command("watch")
@click.argument("place", metavar="RUN")
@click.option("--once", is_flag=True, help="Say where the run is, and end.")
@add_progress_options
def watch_command(place: str, once: bool, as_json: bool, quiet: bool) -> None:
    """Follow a run that another process works on until it ends.

    RUN is its folder, or the storage URL that it is kept at.
    """
    with open_watched_run(place) as run:
        _wait_for_first_line(run, place, max_seconds=0.0 if once else MAX_WAIT_SECONDS)
        is_running = _follow(run, choose_progress_form(as_json, quiet), once=once)
        if not as_json:
            state = _describe_state(run.folder, place, is_running=is_running)
            out.print(escape(state), soft_wrap=True)


def _follow(run: WatchedRun, form: ProgressForm, *, once: bool) -> bool:
    """Show what a run tells until it ends, or once; returns whether it goes on."""
    offset = 0
    lines = [line for line, _ in read_progress(run.folder.progress)]
    told_at = lines[0].unix_seconds if lines else time.time()
    with Progress(form, read_seconds=lambda: told_at) as on_progress:
        while True:
            # Looked at first: what is written until the end of the run is read after it.
            is_running = run.look()
            for line, end in read_progress(run.folder.progress, offset):
                offset = end
                told_at = line.unix_seconds
                on_progress(line.stage, line.message, line.share)
            if once or not is_running:
                on_progress.is_stage_over = not is_running
                return is_running
            time.sleep(run.seconds_between_looks)


def _wait_for_first_line(run: WatchedRun, place: str, *, max_seconds: float) -> None:
    """Wait until a run has begun.

    Raises:
        DataError: None has begun within these seconds.
    """
    end_seconds = time.monotonic() + max_seconds
    run.look()
    if not run.folder.progress.exists() and max_seconds:
        err.print(
            f"no run has begun in {escape(place)}: waiting up to {max_seconds:.0f} s for one",
            soft_wrap=True,
        )
    while not run.folder.progress.exists():
        if time.monotonic() >= end_seconds:
            raise DataError(f"{place}: no run has begun in this folder")
        time.sleep(run.seconds_between_looks)
        run.look()


def _describe_state(folder: RunFolder, place: str, *, is_running: bool) -> str:
    """Return in words whether a run goes on, is finished or was cut off."""
    if is_running:
        return "the run goes on"
    for inner in (folder, *folder.list_inner_folders()):
        if inner.has_next() or inner.has_interrupted_move():
            best = _name_place(inner.bundle, folder, place=place)
            return (
                "the run was cut off while another artifact was made; the same command with "
                f"--resume goes on. The best one so far lies in {best}"
            )
    finished = folder.list_finished_subfolders()
    if folder.summary.exists() or finished:
        last = folder if folder.summary.exists() else folder.get_subfolder(finished[-1])
        summary = load_summary(last.path)
        verdict = "met" if summary.target.met else "missed"
        cure = f"mmcompress show {_name_place(last.path, folder, place=place)} says more"
        if is_remote(place):
            cure = f"mmcompress fetch {place} --out FOLDER copies it"
        return (
            f"the run is finished: {summary.speedup:.2f}x, the target {summary.target.text} is "
            f"{verdict}; {cure}"
        )
    return "the run was cut off; the same command with --resume goes on"


def _name_place(path: Path, folder: RunFolder, *, place: str) -> str:
    """Name a path of a run for a person, who knows the run as a folder or a URL."""
    inner_path = path.relative_to(folder.path).as_posix()
    return place if inner_path == "." else f"{place.rstrip('/')}/{inner_path}"
