"""Retrieval: is the nearest text of an input its own, and the nearest input of a text?"""

from __future__ import annotations

import numpy as np

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores

WIDE_RANKS = (5, 10)
"""Ranks up to which the right answer counts as found in a list of results."""


def score_retrieval(answers: Answers) -> dict[str, PerSampleScores]:
    """Score R@1 both ways. A text that belongs to several inputs counts as right for each of
    them."""
    return _score_ranks(answers, ranks=(1,))


def score_wide_retrieval(answers: Answers) -> dict[str, PerSampleScores]:
    """Score R@5 and R@10 both ways: what a user sees who is shown some results of a search."""
    return _score_ranks(answers, ranks=WIDE_RANKS)


def _score_ranks(answers: Answers, *, ranks: tuple[int, ...]) -> dict[str, PerSampleScores]:
    """Score both ways how often the right answer is among the first ones.

    Args:
        answers: The embeddings of n inputs and of their texts.
        ranks: How many of the nearest ones are looked at.
    """
    assert answers.queries is not None and answers.keys is not None
    similarity_QK = answers.queries @ answers.keys.T
    references = np.array(answers.references)
    figures: dict[str, PerSampleScores] = {}
    for rank in ranks:
        found_texts = _find_right(similarity_QK, references, rank=rank)
        found_inputs = _find_right(similarity_QK.T, references, rank=rank)
        figures[f"image_to_text_r{rank}"] = count_right(found_texts)
        figures[f"text_to_image_r{rank}"] = count_right(found_inputs)
    return figures


def _find_right(similarity_QK: np.ndarray, references: np.ndarray, *, rank: int) -> np.ndarray:
    """Return for every query whether one of its nearest keys is right [q].

    A key is right where its text is that of the query. The first of equal keys is the nearer one.
    """
    nearest_QR = np.argsort(-similarity_QK, axis=1, kind="stable")[:, :rank]
    right: np.ndarray = (references[nearest_QR] == references[:, None]).any(1)
    return right
