"""The tunables and decisions of a run that a caller, or a test, may replace. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mmcompress.results.records import Summary
from mmcompress.run.fitted_structure import FitTolerances
from mmcompress.run.next_artifact import (
    Artifact,
    ArtifactLimits,
    Done,
    Retry,
    is_better,
    next_step,
)


@dataclass(frozen=True, kw_only=True)
class ExtraMeasurements:
    """Further measurements of an artifact that seems to miss its accepted range.

    All of them are made: to stop as soon as it seems to hit would make a hit more likely.
    """

    count: int = 3
    """Measurements that are added."""
    pause_seconds: float = 15.0
    """Seconds before each: a busy machine is slow for seconds at a time."""


@dataclass(frozen=True, kw_only=True)
class RunPolicy:
    """How a run fits, measures and decides."""

    fit: FitTolerances = field(default_factory=FitTolerances)
    """How exactly a structure must measure before it is trained."""
    extra_measurements: ExtraMeasurements = field(default_factory=ExtraMeasurements)
    """What is measured again before an artifact is judged."""
    next_step: Callable[[Sequence[Artifact], ArtifactLimits], Retry | Done] = next_step
    """Decides whether another artifact is made."""
    is_better: Callable[[Summary, Summary], bool] = is_better
    """Decides which of two artifacts is kept."""
