"""Word error rate, with texts made comparable the way Whisper's authors do."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mmcompress.errors import MissingPackage
from mmcompress.metrics.pairs import Answers
from mmcompress.metrics.tally import Tally


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


def wer(a: Answers) -> dict[str, Tally]:
    """Errors over words of all clips together."""
    found = [errors(h, r) for h, r in zip(a.texts, a.references, strict=True)]
    return {"wer": Tally(tuple(float(w) for w, _ in found), tuple(float(n) for _, n in found), error=True)}
