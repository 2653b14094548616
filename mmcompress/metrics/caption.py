"""Captions: is the text that the pipeline settled on the reference text?"""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def normalize_caption(text: str) -> str:
    """Return a text in lower case with single spaces."""
    return " ".join(text.lower().split())


def score_captions(answers: Answers) -> dict[str, PerSampleScores]:
    """Score exact matches, case and spacing aside."""
    right: list[bool] = []
    for text, reference in zip(answers.texts, answers.references, strict=True):
        right.append(normalize_caption(text) == normalize_caption(reference))
    return {"caption_exact_match": count_right(right)}
