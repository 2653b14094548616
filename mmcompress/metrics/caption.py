"""TODO."""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def normalize_caption(text: str) -> str:
    return " ".join(text.lower().split())


def score_captions(a: Answers) -> dict[str, PerSampleScores]:
    """Exact match of the caption the pipeline chose, case and spacing aside."""
    pairs = zip(a.texts, a.references, strict=True)
    return {
        "caption_exact_match": count_right(
            [normalize_caption(x) == normalize_caption(y) for x, y in pairs]
        )
    }
