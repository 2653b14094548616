"""Endings: does a generator end its texts by itself?"""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def score_endings(answers: Answers) -> dict[str, PerSampleScores]:
    """Score texts that end by their end token: neither cut off at the longest length nor for
    repeating themselves."""
    return {"ends_by_itself": count_right([ending == "end" for ending in answers.endings])}
