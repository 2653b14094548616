"""Word error rate, with texts made comparable the way Whisper's authors do."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jiwer

from mmcompress.metrics.answers import Answers
from mmcompress.registry import resolve_entry
from mmcompress.stats import PerSampleScores

NORMALIZER = "transformers.models.whisper.english_normalizer:EnglishTextNormalizer"
"""The text normalizer of Whisper's authors. It comes late, since metrics import no transformers."""


@lru_cache(maxsize=1)
def _load_normalizer() -> Any:
    """Return the text normalizer of Whisper's authors.

    Raises:
        MissingPackage: transformers is not installed.
    """
    make_normalizer = resolve_entry(NORMALIZER)
    return make_normalizer({})


def normalize_transcript(text: str) -> str:
    """Return a text in lower case without punctuation, numbers as digits, contractions spelled out.

    Source: Radford et al. 2022, appendix C.
    """
    return str(_load_normalizer()(text)).strip()


def count_word_errors(transcript: str, reference: str) -> tuple[int, int]:
    """Count the errors in a transcript.

    Returns:
        The words that were substituted, left out or put in, and the words of the reference.
    """
    reference_words = normalize_transcript(reference)
    transcript_words = normalize_transcript(transcript)
    if not reference_words:
        return len(transcript_words.split()), 0
    alignment = jiwer.process_words(reference_words, transcript_words)
    errors = alignment.substitutions + alignment.deletions + alignment.insertions
    return errors, len(reference_words.split())


def score_word_errors(answers: Answers) -> dict[str, PerSampleScores]:
    """Score the errors over the words of all clips together."""
    errors: list[float] = []
    words: list[float] = []
    for transcript, reference in zip(answers.texts, answers.references, strict=True):
        error_count, word_count = count_word_errors(transcript, reference)
        errors.append(float(error_count))
        words.append(float(word_count))
    scores = PerSampleScores(
        numerators=tuple(errors), denominators=tuple(words), is_error_rate=True
    )
    return {"wer": scores}
