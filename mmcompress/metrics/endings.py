"""Endings: does a generator end its texts by itself?"""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def score_endings(answers: Answers) -> dict[str, PerSampleScores]:
    """Score texts that end by their end token, or were never begun for silence: neither cut off at
    the longest length nor for repeating themselves."""
    right = [ending in ("end", "silence") for ending in answers.endings]
    return {"ends_by_itself": count_right(right)}
