"""The structure that will be trained, as the fit leaves it on record. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mmcompress.graph.structure import Candidate
from mmcompress.results.records import Attempt, Bound

MIN_TARGET_SHARE = 0.95
"""Measured latency / target below which more was cut than needed, of a fitted structure and of a
finished artifact."""


@dataclass(frozen=True, kw_only=True)
class FitTolerances:
    """How exactly a structure must measure before it is trained, and how long the fit tries."""

    accepted_width: float = 0.03
    """Share of the target: how far below the upper end a structure may measure. More was cut than
    needed below it."""
    max_attempts: int = 5
    """Structures that are measured before the nearest one is taken."""


@dataclass(frozen=True, kw_only=True)
class FittedStructure:
    """The structure that will be trained, with its latency. `fitted.json`."""

    candidate: Candidate
    """Kept units and precisions."""
    predicted_ms: float
    """Milliseconds a request, as predicted before the measurement."""
    measured_ms: float
    """Milliseconds a request, as measured before the training; more where a node exceeds its own
    limit."""
    target_ms: float
    """Milliseconds a request that were asked for."""
    search_effort: int
    """Trials and level switches that were asked of the search."""
    correction: float
    """Factor on every prediction, learned from measured structures."""
    node_corrections: dict[str, float] = field(default_factory=dict)
    """Factor on the prediction of each node, besides `correction`."""
    floor_ms: float = 0.0
    """Milliseconds: the lowest latency predicted of anything in the search space."""
    fixed_ms: float = 0.0
    """Milliseconds of the floor that no prunable block accounts for."""
    fixed_ms_by_node: dict[str, float] = field(default_factory=dict)
    """The same by node."""
    lowest_reachable: tuple[Bound, ...] = ()
    """Every limit beside the target; its value is the least predicted of anything in the space."""
    touched_bounds: tuple[str, ...] = ()
    """Dimensions of the search space whose upper end the structure has reached."""
    attempts: tuple[Attempt, ...] = ()
    """Structures that were measured on the way, in order."""
    final_to_fitted: float = 1.0
    """Latency of a finished artifact / latency of its structure before training, learned from an
    earlier artifact."""
    writing_factor: float = 1.0
    """The part of `final_to_fitted` that free writing accounts for: what is expected of any
    artifact, or what an earlier one showed."""
    exhausted: bool = False
    """It measures below the accepted range, and the search has nothing larger within the target."""
    is_trimmed: bool = False
    """It is the structure of an artifact that missed by a little, with a few units less."""
    choice_reason: str = ""
    """Why it was chosen, for a person."""

    @property
    def aimed_share(self) -> float:
        """Latency that was aimed at / target; lower where nothing larger was within the target."""
        aimed_ms = self.predicted_ms
        if self.exhausted:
            aimed_ms = min(self.predicted_ms, self.measured_ms)
        return aimed_ms / self.target_ms

    def find_measurement(self) -> Attempt | None:
        """Return the measurement of this very structure before its training, if there is one."""
        if self.is_trimmed:
            return None
        for attempt in reversed(self.attempts):
            if attempt.measured_ms == self.measured_ms:
                return attempt
        return None

    def next_final_to_fitted(self, reached_share: float, *, margin: float = 0.0) -> float:
        """Return the factor for the next artifact, after one of this structure was measured.

        It changes only as far as the two measurements differ by more than their margins. Chance
        alone would else be learned. Both are of the same texts, so it holds no `writing_factor`.

        Args:
            reached_share: Latency of the finished artifact / target, where it writes what the dense
                pipeline wrote.
            margin: Share of that latency that it may be off by.
        """
        measurement = self.find_measurement()
        if measurement is None and self.attempts:
            measurement = self.attempts[-1]
        fitted_margin = measurement.margin if measurement else 0.0
        fitted_share = self.measured_ms / self.writing_factor / self.target_ms
        change = math.log(reached_share / fitted_share)
        excess = max(abs(change) - fitted_margin - margin, 0.0)
        factor = self.final_to_fitted / self.writing_factor
        return factor * math.exp(math.copysign(excess, change))
