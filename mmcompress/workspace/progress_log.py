"""Where a run is, written into its folder for those who watch it from another place."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmcompress.runtime.progress import ProgressListener
from mmcompress.workspace.folder import RunFolder

MIN_SECONDS_BETWEEN_LINES = 1.0
"""Seconds between two lines of one stage: a search tells of some hundred steps in a second."""


@dataclass(frozen=True, kw_only=True)
class ProgressLine:
    """One message of a run."""

    unix_seconds: float
    """When it was told."""
    stage: str
    """The stage."""
    message: str
    """What it does."""
    share: float | None
    """Share of the stage that is done, 0 .. 1; None for a message of its own."""


class ProgressLog:
    """A listener that writes what it hears into a file, and hands it on."""

    def __init__(self, folder: RunFolder, forward: ProgressListener):
        """Make a listener.

        Args:
            folder: The run folder; lines are added to its log from `begin` on. Until then they
                wait: a run that is refused leaves nothing in a folder.
            forward: Hears everything.
        """
        self.folder = folder
        self.forward = forward
        self._has_begun = False
        self._waiting_lines: list[str] = []
        self._stage = ""
        self._written_at = 0.0

    def begin(self) -> None:
        """Write what was heard so far, and everything after it: the run has begun."""
        self._has_begun = True
        self._write_lines()

    def __call__(self, stage: str, message: str, share: float | None) -> None:
        """Hear of progress."""
        self.forward(stage, message, share)
        now_seconds = time.time()
        is_news = stage != self._stage or share is None
        if not is_news and now_seconds - self._written_at < MIN_SECONDS_BETWEEN_LINES:
            return
        self._stage = stage
        self._written_at = now_seconds
        line = {"unix_seconds": now_seconds, "stage": stage, "message": message, "share": share}
        self._waiting_lines.append(json.dumps(line) + "\n")
        if self._has_begun:
            self._write_lines()

    def _write_lines(self) -> None:
        """Write the lines that wait."""
        # Nobody may watch, and a full disk is told where it costs something.
        with suppress(OSError), self.folder.progress.open("a", encoding="utf-8") as log:
            log.writelines(self._waiting_lines)
        self._waiting_lines.clear()


def read_progress(file: Path, offset: int = 0) -> Iterator[tuple[ProgressLine, int]]:
    """Read the whole lines of a log from some place on.

    Args:
        file: The log; it may be missing.
        offset: Bytes of it that are known.

    Yields:
        A line, and the bytes up to its end. Lines that can't be read are passed over.
    """
    if not file.exists():
        return
    with file.open("rb") as log:
        log.seek(offset)
        for line in log:
            if not line.endswith(b"\n"):
                # It is being written.
                return
            offset += len(line)
            with suppress(ValueError, TypeError):
                yield ProgressLine(**json.loads(line)), offset
