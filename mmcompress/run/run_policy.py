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

WANTED_LATENCY_MARGIN = 0.015
"""Share that the ratio of the two latencies may be off by at the end. Below it, a measurement of a
finished artifact is over. A larger one is told."""


@dataclass(frozen=True, kw_only=True)
class MeasuringLimits:
    """When the measuring of a finished artifact ends.

    The rule never looks at the target: to stop as soon as an artifact seems to hit it would make a
    hit more likely.
    """

    wanted_margin: float = WANTED_LATENCY_MARGIN
    """Share that the ratio of the two latencies may be off by; measuring ends below it."""
    max_parts: int = 6
    """Parts after which it ends in any case, with those around the evaluation."""


@dataclass(frozen=True, kw_only=True)
class RunPolicy:
    """How a run fits, measures and decides."""

    fit: FitTolerances = field(default_factory=FitTolerances)
    """How exactly a structure must measure before it is trained."""
    measuring: MeasuringLimits | None = None
    """How long a finished artifact is measured before it is judged; None: as the spec says."""
    next_step: Callable[[Sequence[Artifact], ArtifactLimits], Retry | Done] = next_step
    """Decides whether another artifact is made."""
    is_better: Callable[[Summary, Summary], bool] = is_better
    """Decides which of two artifacts is kept."""
