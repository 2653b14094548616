"""Embeddings that no join compares: are they still nearest to what the dense encoder gave?"""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores

ROUNDING = 1e-6
"""Difference of cosine similarities below which two of them count as equal."""


def score_embeddings(answers: Answers) -> dict[str, PerSampleScores]:
    """Score inputs whose embedding is nearer to the dense one of the same input than to that of any
    other."""
    dense = answers.dense or answers
    assert answers.vectors is not None and dense.vectors is not None
    similarity = answers.vectors @ dense.vectors.T
    is_nearest = similarity.diagonal() >= similarity.max(1) - ROUNDING
    return {"embedding_r1": count_right(is_nearest)}
