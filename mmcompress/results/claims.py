"""What a comparison says: one record for each claim."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """A claim that one side keeps more quality than another, with its verdict."""

    text: str
    """The claim as a sentence."""
    verdict: str
    """`supported`, `not supported`, `undecided at this n`, or why it can't be judged."""
    difference: float
    """Share of the test inputs, mean over the metrics: quality of the better side less the other's.
    """
    ci_half_width: float
    """Share of the test inputs: half the width of the 95 % interval of the difference."""
