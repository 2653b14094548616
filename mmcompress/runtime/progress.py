"""Progress of long work: who listens, and how a part of the work reports to a listener.

A listener hears of all stages. A stage binds its name, `partial(listener, "search")`, and hands on
what is left: the work below knows neither its stage nor its share of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class ProgressListener(Protocol):
    """Hears where a run is, for a person."""

    def __call__(self, stage: str, message: str, share: float | None, /) -> None:
        """Hear of progress.

        Args:
            stage: The stage of the run.
            message: What it does.
            share: The share of the stage that is done, 0..1; None for a message of its own.
        """


StageProgress = Callable[[str, float | None], None]
"""A listener whose stage is bound: receives (message, share or None)."""


def ignore_progress(*_: object) -> None:
    """Ignore progress: what work calls that nobody listens to."""


def scale_progress(progress: StageProgress, *, start: float, end: float) -> StageProgress:
    """Return what a part of the work reports to, so that its shares lie in `start..end`.

    Args:
        progress: Receives messages and shares of the whole work.
        start: Share of the whole that is done when the part begins, 0..1.
        end: Share of the whole that is done when the part ends, 0..1.
    """

    def report_scaled(message: str, share: float | None) -> None:
        progress(message, None if share is None else start + (end - start) * share)

    return report_scaled


def prefix_progress(progress: StageProgress, prefix: str) -> StageProgress:
    """Return what a part of the work reports to, so that its messages begin with `prefix`."""

    def report_prefixed(message: str, share: float | None) -> None:
        progress(f"{prefix}{message}", share)

    return report_prefixed
