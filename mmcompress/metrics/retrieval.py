"""Retrieval: is the nearest text of an input its own, and the nearest input of a text?"""

from __future__ import annotations

import numpy as np

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def score_retrieval(answers: Answers) -> dict[str, PerSampleScores]:
    """Score R@1 both ways. A text that belongs to several inputs counts as right for each of
    them."""
    assert answers.queries is not None and answers.keys is not None
    similarity = answers.queries @ answers.keys.T
    references = np.array(answers.references)
    nearest_texts = references[similarity.argmax(1)]
    texts_of_nearest_inputs = references[similarity.argmax(0)]
    return {
        "image_to_text_r1": count_right(nearest_texts == references),
        "text_to_image_r1": count_right(texts_of_nearest_inputs == references),
    }
