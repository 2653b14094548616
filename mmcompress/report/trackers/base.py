"""What a tracker is, and how `--track KIND:ADDRESS` opens one."""

from __future__ import annotations

from typing import Protocol

from mmcompress.errors import SpecError
from mmcompress.registry import TRACKERS
from mmcompress.results.records import Summary
from mmcompress.workspace.folder import RunFolder


class Tracker(Protocol):
    """Keeps the results of runs on a server."""

    def log_result(self, summary: Summary, folder: RunFolder) -> str:
        """Send the result of one target: settings, figures, report and bundle.

        Args:
            summary: The result.
            folder: Its run folder.

        Returns:
            Where it can be looked at.

        Raises:
            TrackingError: The server refuses, or can't be reached.
        """
        ...


class OpenTracker(Protocol):
    """Connects to a server."""

    def __call__(self, address: str, /) -> Tracker:
        """Connect to the server at an address; raises `TrackingError` when it does not answer."""
        ...


def open_tracker(text: str) -> Tracker:
    """Open the tracker that `--track` names, and check that its server answers.

    Args:
        text: `KIND:ADDRESS`, such as `mlflow:http://127.0.0.1:5000`.

    Raises:
        SpecError: It names no known kind, or no address.
        MissingPackage: The package of that kind is not installed.
        TrackingError: The server does not answer.
    """
    kind, colon, address = text.partition(":")
    if not colon or not address:
        raise SpecError(f"--track {kind}: expected KIND:ADDRESS, e.g. mlflow:http://127.0.0.1:5000")
    problem = TRACKERS.find_problem(kind)
    if problem:
        raise SpecError(f"--track {kind}: {problem}")
    connect: OpenTracker = TRACKERS.get(kind)
    return connect(address)
