"""A group of commands that imports a command when it is called, and tells errors in one message."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.markup import escape

from mmcompress.cli.console import err
from mmcompress.cli.program_name import make_resume_line
from mmcompress.cli.watched_process import (
    AT_ONCE,
    INTERRUPTED_EXIT_CODE,
    is_watched,
    run_watched,
    tell_watcher,
)
from mmcompress.errors import MmcompressError, find_disk_error, shorten
from mmcompress.registry import name_missing_packages, resolve_entry

TERMINATED_EXIT_CODE = 143
"""Exit code after SIGTERM, which `kill` and batch systems send."""


DEBUG_FLAG = "--debug"
"""Flag of every command: an error shows its traceback."""

UNEXPECTED_EXIT_CODE = 1
"""Exit code after an error that this project did not foresee."""


STOPPING_MESSAGE = "stopping; Ctrl-C again ends it at once"
"""What the first Ctrl-C tells."""

STDERR_DESCRIPTOR = 2
"""Number of the stream of errors. A handler of signals writes to it without a lock."""


class TerminationRequested(KeyboardInterrupt):
    """SIGTERM asked the process to end: it stops as after Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class CommandRow:
    """One command."""

    target: str
    """`module:function` of the command."""
    about: str
    """Its line in the help of the group."""
    is_resumable: bool = False
    """Whether it has the flag `--resume`. An interruption must not import the command to see."""
    puts_away: bool = False
    """Whether it puts away what it does when it is interrupted. A second Ctrl-C ends it at once."""


class LazyGroup(click.Group):
    """Imports a command when it is called."""

    def __init__(self, *args: Any, commands_by_name: Mapping[str, CommandRow], **options: Any):
        super().__init__(*args, **options)
        self.commands_by_name = commands_by_name
        self.arguments: list[str] = []
        """The arguments of the command that runs."""
        self.shows_tracebacks = False
        """Whether an error shows its traceback (`--debug`)."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        """Run a command line; one that uses Ray is run as a child of this process."""
        if args is not None:
            return super().main(self._take_debug_flag(args), *others, **options)
        arguments = self._take_debug_flag(sys.argv[1:])
        if is_watched(arguments):
            flags = [DEBUG_FLAG] if self.shows_tracebacks else []
            sys.exit(run_watched(arguments, flags=flags))
        if not others:
            # A child is called `python -m mmcompress.cli`, and a person called the program.
            options.setdefault("prog_name", "mmcompress")
        with tell_watcher():
            return super().main(arguments, *others, **options)

    def _take_debug_flag(self, arguments: Sequence[str]) -> list[str]:
        """Return a command line without `--debug`, which may stand anywhere in it."""
        self.shows_tracebacks = DEBUG_FLAG in arguments
        return [argument for argument in arguments if argument != DEBUG_FLAG]

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(self.commands_by_name)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        row = self.commands_by_name.get(name)
        if row is None:
            return None
        command: click.Command = resolve_entry(row.target)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that a command line names; the nearest one is told where there is none.

        Raises:
            UsageError: There is no such command.
        """
        name = args[0]
        if not name.startswith("-") and name not in self.commands_by_name:
            nearest = difflib.get_close_matches(name, self.commands_by_name, 1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else "mmcompress --help lists them"
            raise click.UsageError(f"no command is named '{shorten(name)}'; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the names of commands from the rows; no command is imported."""
        items = [
            CompletionItem(name, help=row.about)
            for name, row in self.commands_by_name.items()
            if name.startswith(incomplete)
        ]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of the group from its rows; no command is imported."""
        rows = [(name, row.about) for name, row in self.commands_by_name.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        formatter.write_paragraph()
        formatter.write(f"{DEBUG_FLAG} anywhere in a line shows the traceback of an error.\n")

    def invoke(self, context: click.Context) -> Any:
        """Run a command; an error of this project becomes one message and its exit code."""
        warnings.showwarning = _show_warning
        try:
            # Libraries import packages late too: Optuna's Gaussian process meets scipy at work.
            with name_missing_packages(), stop_on_sigterm(), self._stop_on_interruptions():
                return super().invoke(context)
        except MmcompressError as error:
            self._exit_with(error, context)
        except OSError as error:
            if error.errno == errno.EPIPE:
                # Who reads the output has gone, as `head` does: click ends in silence.
                raise
            disk_error = find_disk_error(error)
            if disk_error is None:
                self._exit_with_unexpected(error, context)
            else:
                self._exit_with(disk_error, context)
        except TerminationRequested:
            err.print(f"terminated{escape(self._describe_resumption())}", soft_wrap=True)
            context.exit(TERMINATED_EXIT_CODE)
        except KeyboardInterrupt:
            err.print(f"interrupted{escape(self._describe_resumption())}", soft_wrap=True)
            context.exit(INTERRUPTED_EXIT_CODE)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            self._exit_with_unexpected(error, context)

    def _stop_on_interruptions(self) -> AbstractContextManager[None]:
        """Return a context in which a second Ctrl-C ends a command that puts things away."""
        row = self._find_called_row()
        if row is None or not row.puts_away:
            return nullcontext()
        return stop_on_interruptions(f"{AT_ONCE}{self._describe_resumption()}")

    def _find_called_row(self) -> CommandRow | None:
        """Return the row of the command that runs; None where the line names none."""
        for argument in self.arguments:
            if argument in self.commands_by_name:
                return self.commands_by_name[argument]
        return None

    def _exit_with(self, error: MmcompressError, context: click.Context) -> None:
        """Tell an error in one message and end with its exit code."""
        if _shows_tracebacks(context):
            traceback.print_exception(error)
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        context.exit(error.exit_code)

    def _exit_with_unexpected(self, error: Exception, context: click.Context) -> None:
        """Tell an error that nobody foresaw: where it came from, and how to see more."""
        if _shows_tracebacks(context):
            traceback.print_exception(error)
        last_frame = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"unexpected {type(error).__name__}: {error} "
            f"(at {last_frame.filename}:{last_frame.lineno})"
        )
        if not _shows_tracebacks(context):
            text += f"; {DEBUG_FLAG} shows the traceback"
        text += self._describe_resumption(flags=[DEBUG_FLAG])
        err.print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)
        context.exit(UNEXPECTED_EXIT_CODE)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments: an interrupted command tells how to go on."""
        self.arguments = list(args)
        return super().parse_args(context, args)

    def _describe_resumption(self, *, flags: Sequence[str] = ()) -> str:
        """Return the end of a message: the line that goes on with the interrupted command.

        Args:
            flags: Flags of the program that the line has on top.
        """
        row = self._find_called_row()
        if row is None or not row.is_resumable:
            return ""
        return f"; go on with: {make_resume_line(self.arguments, flags=flags)}"


def _shows_tracebacks(context: click.Context) -> bool:
    """Return whether `--debug` was given. A group within a group asks the outer one."""
    group = context.find_root().command
    return isinstance(group, LazyGroup) and group.shows_tracebacks


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise `TerminationRequested` in the block when the process gets SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        # Python lets only the main thread of a process handle signals.
        yield
        return
    handler_before = signal.signal(signal.SIGTERM, _raise_termination)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler_before)


@contextmanager
def stop_on_interruptions(last_words: str) -> Iterator[None]:
    """Raise `KeyboardInterrupt` in the block after Ctrl-C; end the process after a second one.

    Args:
        last_words: What is told then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_stopping = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            # What is cleaned up now may hold any lock: nothing but the system is asked.
            os.write(STDERR_DESCRIPTOR, f"{last_words}\n".encode())
            os._exit(INTERRUPTED_EXIT_CODE)
        is_stopping = True
        os.write(STDERR_DESCRIPTOR, f"\n{STOPPING_MESSAGE}\n".encode())
        raise KeyboardInterrupt

    handler_before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler_before)


def _raise_termination(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM."""
    raise TerminationRequested


def _show_warning(message: Warning | str, *details: Any, **options: Any) -> None:
    """Tell a warning of this project as one line."""
    err.print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True)
