"""The clock that a run reads and waits by, in one place so that a test can hand it another one."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of elapsed time."""

    def now(self) -> float:
        """Return seconds since some fixed moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
        ...


class SystemClock:
    """The clock of this machine; it never goes backwards."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
