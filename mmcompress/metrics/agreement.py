"""TODO."""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def score_agreement(a: Answers) -> dict[str, PerSampleScores]:
    """Share of inputs for which the text found (or written) is the dense pipeline's."""
    theirs = (a.dense or a).answers
    return {"agreement": count_right([x == y for x, y in zip(a.answers, theirs, strict=True)])}
