"""The options that every way to begin a run takes, by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from mmcompress.errors import suggest_nearest
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.runtime.progress import ProgressListener
from mmcompress.runtime.timing import Clock


class RunOptions(TypedDict, total=False):
    """Options of `run`, `run_targets`, `open_run`, `compare` and `ablate`; all may be left out."""

    space: str | Path | None
    """The search space file; by default the one of the package."""
    overrides: dict[str, Any] | None
    """Values by dotted key that replace those of the spec."""
    resume: bool
    """Whether to go on with the run in the folder; by default it must be new or empty."""
    from_run: str | Path | None
    """The folder of an earlier run: what it measured of the same dense pipeline is taken over."""
    on_progress: ProgressListener
    """Receives messages for a person; by default nobody does."""
    bench: Benchmarker | None
    """Measures latency; by default this machine, in processes of their own."""
    clock: Clock | None
    """Tells the time; by default the clock of this machine."""


def require_known_options(options: RunOptions) -> None:
    """Raise `TypeError` when an option has another name: Python does not check these.

    Args:
        options: What a caller gave by keyword.
    """
    choices = RunOptions.__annotations__
    for name in options:
        if name not in choices:
            hint = suggest_nearest(name, choices)
            raise TypeError(
                f"unknown option '{name}'; {hint}; keys of the spec go into overrides: "
                f"overrides={{'{name}': ...}}"
            )
    overrides = options.get("overrides")
    if overrides is not None and not isinstance(overrides, dict):
        raise TypeError(
            f"overrides: expected a mapping such as {{'search.trials': 8}}, got {overrides!r}"
        )
