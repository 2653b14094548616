"""The console of all commands, and progress as a person or a program sees it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Literal, TextIO, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcompress.cli.live_view import FORECAST_STAGE, LiveState, LiveView

PIPE_WIDTH = 160
"""Columns of a table where there is no terminal."""


def _make_console(stream: TextIO) -> Console:
    """Make a console that breaks no line: a terminal does that, and a pipe needs none broken."""
    width = None if stream.isatty() else PIPE_WIDTH
    is_error_stream = stream is sys.stderr
    return Console(stderr=is_error_stream, highlight=False, soft_wrap=True, width=width)


out = _make_console(sys.stdout)
"""Results."""

err = _make_console(sys.stderr)
"""Progress, warnings and errors."""

SECONDS_BETWEEN_LINES = 10
"""Seconds between two lines of one stage where there is no terminal."""

MIN_TOLD_SECONDS = 1.0
"""Seconds of a stage from which on a terminal keeps a line of it."""

DONE = "[green]done[/green] in"
"""How a stage ended, before its seconds."""

INTERRUPTED = "[yellow]interrupted[/yellow] after"
"""The same, after Ctrl-C or SIGTERM."""

FAILED = "[red]failed[/red] after"
"""The same, after an error."""

Command = TypeVar("Command", bound=Callable[..., object])

ProgressForm = Literal["person", "json", "quiet"]
"""For a person, as JSON lines for a program, or not at all."""


class Progress:
    """Shows stages as they pass.

    On a terminal one line is live, and a line stays of every stage that is finished. Elsewhere
    there is a line every few seconds. A program reads one JSON object a line from standard output.
    """

    def __init__(
        self,
        form: ProgressForm = "person",
        *,
        read_seconds: Callable[[], float] | None = None,
    ) -> None:
        """Begin to show progress.

        Args:
            form: Who reads it.
            read_seconds: The clock that messages are told by; None: that of this process.
        """
        self.is_stage_over = True
        """Whether the last stage is over when no more is shown, if no error ends it."""
        self._read_seconds = read_seconds or time.monotonic
        self.began_at = self._read_seconds()
        self.stage = ""
        self.stage_began_at = self.began_at
        self.last_line_at = 0.0
        self.form = form
        is_live = form == "person" and err.is_terminal
        self.message = ""
        self.share: float | None = None
        self.forecast = ""
        # The view asks for the state at once.
        self.view = LiveView(err, self._describe_state) if is_live else None

    def __call__(self, stage: str, message: str, share: float | None) -> None:
        """Show where a run is.

        Args:
            stage: The stage.
            message: What it does.
            share: The share that is done; None for a message of its own.
        """
        if self.form == "json":
            write_event(
                "progress",
                seconds=round(self._read_seconds() - self.began_at, 1),
                stage=stage,
                message=message,
                share=share,
            )
        elif self.form == "person":
            self._show(stage, message, share=share)

    def _show(self, stage: str, message: str, *, share: float | None) -> None:
        """Show a person where a run is."""
        now_seconds = self._read_seconds()
        if stage == FORECAST_STAGE:
            # It tells of the whole run, in the middle of a stage.
            self.forecast = message
            self._print_line(now_seconds, stage, text=escape(message))
            return
        is_new_stage = stage != self.stage
        if is_new_stage:
            self._keep_line_of_stage(now_seconds, DONE)
            self.stage = stage
            self.stage_began_at = now_seconds
        if self.view is not None:
            if share is None:
                self._print_line(now_seconds, stage, text=escape(message))
            self.message = message
            self.share = share
            self.view.start()
        elif (
            is_new_stage or share is None or now_seconds - self.last_line_at > SECONDS_BETWEEN_LINES
        ):
            self.last_line_at = now_seconds
            percent = "" if share is None else f"{share:4.0%}  "
            self._print_line(now_seconds, stage, text=f"{percent}{escape(message)}")

    def _describe_state(self) -> LiveState:
        """Return the state of the moment, for the live view."""
        now_seconds = self._read_seconds()
        return LiveState(
            stage=self.stage,
            message=self.message,
            share=self.share,
            stage_seconds=now_seconds - self.stage_began_at,
            run_seconds=now_seconds - self.began_at,
            forecast=self.forecast,
        )

    def _keep_line_of_stage(self, now_seconds: float, end: str) -> None:
        """Leave a line of a stage on a terminal, with how it ended."""
        stage_seconds = now_seconds - self.stage_began_at
        if self.view is not None and self.stage and stage_seconds >= MIN_TOLD_SECONDS:
            self._print_line(now_seconds, self.stage, text=f"{end} {stage_seconds:.0f} s")

    def _print_line(self, now_seconds: float, stage: str, *, text: str) -> None:
        """Print the seconds since the beginning, the stage, and a text.

        A terminal breaks it between words, behind the stage. A log has lines of any length.
        """
        seconds = f"[dim]{now_seconds - self.began_at:5.0f} s[/dim]"
        name = f"[bold]{stage:<12}[/bold]"
        if not err.is_terminal:
            err.print(f"{seconds}  {name}  {text}", soft_wrap=True)
            return
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True)
        row.add_column(overflow="fold")
        row.add_row(seconds, name, text)
        err.print(row, soft_wrap=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        if self.view is None:
            return
        if error_type is not None:
            end = INTERRUPTED if issubclass(error_type, KeyboardInterrupt) else FAILED
            self._keep_line_of_stage(self._read_seconds(), end)
        elif self.is_stage_over:
            self._keep_line_of_stage(self._read_seconds(), DONE)
        self.view.stop()


def write_event(event: str, **facts: object) -> None:
    """Write one event as a JSON object on a line of standard output."""
    click.echo(json.dumps({"event": event, **facts}))


def choose_progress_form(as_json: bool, quiet: bool) -> ProgressForm:
    """Return how progress is shown, by the flags of a command; with both flags it is not."""
    if quiet:
        return "quiet"
    return "json" if as_json else "person"


def add_progress_options(command: Command) -> Command:
    """Give a command the flags `--json` and `--quiet`."""
    quiet = click.option("--quiet", is_flag=True, help="Show the result alone.")
    as_json = click.option(
        "--json", "as_json", is_flag=True, help="Events as JSON, one a line, for a program."
    )
    return as_json(quiet(command))
