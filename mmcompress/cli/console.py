"""The console of all commands, and progress as a person sees it."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape

out = Console(highlight=False)
"""Results."""

err = Console(stderr=True, highlight=False)
"""Progress, warnings and errors."""

SECONDS_BETWEEN_LINES = 10
"""Seconds between two lines of one stage where there is no terminal."""


class Progress:
    """Shows stages as they pass: one live line on a terminal, a line every few seconds
    elsewhere."""

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.stage = ""
        self.last_line_at = 0.0
        self.status = err.status("") if err.is_terminal else None

    def __call__(self, stage: str, message: str, share: float | None) -> None:
        """Show where a run is.

        Args:
            stage: The stage.
            message: What it does.
            share: The share that is done; None for a message of its own.
        """
        now_seconds = time.monotonic()
        percent = "" if share is None else f" {share:4.0%}"
        seconds = f"{now_seconds - self.began_at:5.0f} s"
        line = f"[dim]{seconds}[/dim]  [bold]{stage:<12}[/bold]{percent}  {escape(message)}"
        is_news = stage != self.stage or share is None
        self.stage = stage
        if self.status is not None:
            self.status.start()
            self.status.update(line)
            if share is None:
                err.print(line)
        elif is_news or now_seconds - self.last_line_at > SECONDS_BETWEEN_LINES:
            self.last_line_at = now_seconds
            err.print(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()
