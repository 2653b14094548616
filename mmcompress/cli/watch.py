"""`mmcompress watch`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
from rich.markup import escape

from mmcompress.cli.console import (
    Progress,
    ProgressForm,
    add_progress_options,
    choose_progress_form,
    err,
    out,
    write_event,
)
from mmcompress.cli.results_table import write_result_event
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
@click.option("--once", is_flag=True, help="Tell the last line of the run and its state, and end.")
@add_progress_options
def watch_command(place: str, once: bool, as_json: bool, quiet: bool) -> None:
    """Follow a run that another process works on until it ends.

    RUN is its folder, or the storage URL that it is kept at.
    """
    with open_watched_run(place) as run:
        _wait_for_first_line(run, place, max_seconds=0.0 if once else MAX_WAIT_SECONDS)
        is_running = _follow(run, choose_progress_form(as_json, quiet), once=once)
        state = _find_state(run.folder, place, is_running=is_running)
        if not as_json:
            out.print(escape(state.message), soft_wrap=True)
            return
        for folder in _list_results(run.folder) if state.name == "finished" else ():
            write_result_event(load_summary(folder.path), folder)
        write_state_event(state)


@dataclass(frozen=True, kw_only=True)
class WatchedState:
    """Where a run is."""

    name: Literal["running", "finished", "cut off"]
    """One word for a program."""
    message: str
    """The same in words for a person."""


def write_state_event(state: WatchedState) -> None:
    """Write where a run is as an event."""
    write_event("state", state=state.name, message=state.message)


def _follow(run: WatchedRun, form: ProgressForm, *, once: bool) -> bool:
    """Show what a run tells until it ends, or once; returns whether it goes on."""
    offset = 0
    lines = [line for line, _ in read_progress(run.folder.progress)]
    told_at = lines[0].unix_seconds if lines else time.time()
    with Progress(form, read_seconds=lambda: told_at) as on_progress:
        while True:
            # Looked at first: what is written until the end of the run is read after it.
            is_running = run.look()
            new_lines = list(read_progress(run.folder.progress, offset))
            for line, end in new_lines[-1:] if once else new_lines:
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


def _find_state(folder: RunFolder, place: str, *, is_running: bool) -> WatchedState:
    """Find whether a run goes on, is finished or was cut off."""
    if is_running:
        return WatchedState(name="running", message="the run goes on")
    for inner in (folder, *folder.list_inner_folders()):
        if inner.has_next() or inner.has_interrupted_move():
            best = _name_place(inner.bundle, folder, place=place)
            return WatchedState(
                name="cut off",
                message="the run was cut off while another artifact was made; the same command "
                f"with --resume goes on. The best one so far lies in {best}",
            )
    results = _list_results(folder)
    if not results:
        message = "the run was cut off; the same command with --resume goes on"
        return WatchedState(name="cut off", message=message)
    summary = load_summary(results[-1].path)
    verdict = "met" if summary.target.met else "missed"
    cure = f"mmcompress show {_name_place(results[-1].path, folder, place=place)} says more"
    if is_remote(place):
        cure = f"mmcompress fetch {place} --out FOLDER copies it"
    return WatchedState(
        name="finished",
        message=f"the run is finished: {summary.speedup:.2f}x, the target {summary.target.text} is "
        f"{verdict}; {cure}",
    )


def _list_results(folder: RunFolder) -> list[RunFolder]:
    """List the folders of a run that hold a finished artifact."""
    if folder.summary.exists():
        return [folder]
    return [folder.get_subfolder(name) for name in folder.list_finished_subfolders()]


def _name_place(path: Path, folder: RunFolder, *, place: str) -> str:
    """Name a path of a run for a person, who knows the run as a folder or a URL."""
    inner_path = path.relative_to(folder.path).as_posix()
    return place if inner_path == "." else f"{place.rstrip('/')}/{inner_path}"
