"""Agreement: does the compressed pipeline answer as the dense one does?"""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def score_agreement(answers: Answers) -> dict[str, PerSampleScores]:
    """Score inputs for which the text that was found or written is the dense pipeline's."""
    dense = answers.dense or answers
    pairs = zip(answers.texts, dense.texts, strict=True)
    return {"agreement": count_right([text == dense_text for text, dense_text in pairs])}
