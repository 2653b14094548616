"""Word error rate, with texts made comparable the way Whisper's authors do."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from mmcompress.errors import MissingPackage
from mmcompress.metrics.pairs import Answers
from mmcompress.records import Quality

DRAWS = 2000


@lru_cache(maxsize=1)
def _normalizer() -> Any:
    try:
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    except ImportError as e:
        raise MissingPackage("transformers", "compress") from e
    return EnglishTextNormalizer({})


def normal(text: str) -> str:
    """Lower case, no punctuation, numbers as digits, contractions spelled out (Radford et al. 2022, appendix C)."""
    return str(_normalizer()(text)).strip()


def errors(heard: str, reference: str) -> tuple[int, int]:
    """(words substituted, left out or put in; words of the reference)."""
    try:
        import jiwer
    except ImportError as e:
        raise MissingPackage("jiwer", "compress") from e
    a, b = normal(reference), normal(heard)
    if not a:
        return len(b.split()), 0
    found = jiwer.process_words(a, b)
    return found.substitutions + found.deletions + found.insertions, len(a.split())


def wer(a: Answers) -> dict[str, Quality]:
    """Errors over words of all clips together; 95 % interval by bootstrap over clips."""
    wrong, words = np.array([errors(h, r) for h, r in zip(a.texts, a.references, strict=True)]).T
    rate = lambda w, n: w.sum(-1) / np.maximum(n.sum(-1), 1)
    draws = np.random.default_rng(0).integers(0, len(words), (DRAWS, len(words)))
    low, high = np.percentile(rate(wrong[draws], words[draws]), (2.5, 97.5))
    return {"wer": Quality(float(rate(wrong, words)), float(low), float(high), len(words), error=True)}
