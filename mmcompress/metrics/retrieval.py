"""TODO."""

from __future__ import annotations

import numpy as np

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def score_retrieval(a: Answers) -> dict[str, PerSampleScores]:
    """R@1 both ways; a caption that occurs twice counts as right for each of its images."""
    assert a.queries is not None and a.keys is not None
    sim = a.queries @ a.keys.T
    refs = np.array(a.references)
    return {
        "image_to_text_r1": count_right(refs[sim.argmax(1)] == refs),
        "text_to_image_r1": count_right(refs[sim.argmax(0)] == refs),
    }
