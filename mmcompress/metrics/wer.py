"""Word error rate, with texts made comparable the way Whisper's authors do."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mmcompress.errors import MissingPackage
from mmcompress.metrics.answers import Answers
from mmcompress.stats import PerSampleScores


@lru_cache(maxsize=1)
def _normalizer() -> Any:
    try:
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    except ImportError as e:
        raise MissingPackage("transformers", "compress") from e
    return EnglishTextNormalizer({})


def normalize_transcript(text: str) -> str:
    """Lower case, no punctuation, numbers as digits, contractions spelled out (Radford et al. 2022, appendix C)."""
    return str(_normalizer()(text)).strip()


def count_word_errors(heard: str, reference: str) -> tuple[int, int]:
    """(words substituted, left out or put in; words of the reference)."""
    try:
        import jiwer
    except ImportError as e:
        raise MissingPackage("jiwer", "compress") from e
    a, b = normalize_transcript(reference), normalize_transcript(heard)
    if not a:
        return len(b.split()), 0
    found = jiwer.process_words(a, b)
    return found.substitutions + found.deletions + found.insertions, len(a.split())


def score_word_errors(a: Answers) -> dict[str, PerSampleScores]:
    """Errors over words of all clips together."""
    found = [count_word_errors(h, r) for h, r in zip(a.texts, a.references, strict=True)]
    return {
        "wer": PerSampleScores(
            numerators=tuple(float(w) for w, _ in found),
            denominators=tuple(float(n) for _, n in found),
            is_error_rate=True,
        )
    }
