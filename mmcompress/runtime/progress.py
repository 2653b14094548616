"""Progress of long work: what is called with a message and the share that is done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Receives (message, share done 0..1): progress of one piece of work, for a person."""


def ignore_progress(message: str, share: float) -> None:
    """Ignore progress messages: what work calls that nobody listens to."""
