"""TODO."""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def score_endings(a: Answers) -> dict[str, PerSampleScores]:
    """Share of texts that end by their end token: not cut off at the longest length, nor for repeating themselves."""
    return {"ends_by_itself": count_right([e == "end" for e in a.endings])}
