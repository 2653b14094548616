"""Rules that change the scores of next tokens, each as the class of that name in transformers.

See `transformers.generation.logits_process`. A rule changes scores [B, V] in place.

Shapes: B beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def penalize_repetition_(
    scores_BV: np.ndarray,
    running: Sequence[Sequence[int]],
    *,
    history: Sequence[int],
    penalty: float,
) -> None:
    """Make tokens less likely that stand in a sequence already (`RepetitionPenalty…`).

    Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for Controllable
    Generation": positive scores are divided by the penalty, negative ones multiplied.

    Args:
        scores_BV: Scores of the next token, float32 [B, V].
        running: Token ids of each sequence.
        history: Token ids ahead of all sequences.
        penalty: The factor, above 0.
    """
    vocabulary = scores_BV.shape[1]
    for scores_V, ids in zip(scores_BV, running, strict=True):
        seen_ids = [token for token in {*history, *ids} if token < vocabulary]
        seen_scores = scores_V[seen_ids]
        is_negative = seen_scores < 0
        scores_V[seen_ids] = np.where(is_negative, seen_scores * penalty, seen_scores / penalty)


def ban_repeated_spans_(
    scores_BV: np.ndarray,
    running: Sequence[Sequence[int]],
    *,
    history: Sequence[int],
    size: int,
) -> None:
    """Ban tokens that would complete a span of `size` tokens a second time (`NoRepeatNGram…`).

    Args:
        scores_BV: Scores of the next token, float32 [B, V].
        running: Token ids of each sequence.
        history: Token ids ahead of all sequences.
        size: Tokens of a span, at least 1.
    """
    for scores_V, row in zip(scores_BV, running, strict=True):
        ids = [*history, *row]
        last_ids = ids[len(ids) + 1 - size :]
        for start in range(len(ids) + 1 - size):
            end = start + size - 1
            if ids[start:end] == last_ids and ids[end] < len(scores_V):
                scores_V[ids[end]] = -np.inf


def ban_bad_words_(
    scores_BV: np.ndarray,
    running: Sequence[Sequence[int]],
    *,
    history: Sequence[int],
    words: Sequence[Sequence[int]],
) -> None:
    """Ban tokens that would complete a word (`NoBadWords…`).

    Args:
        scores_BV: Scores of the next token, float32 [B, V].
        running: Token ids of each sequence.
        history: Token ids ahead of all sequences.
        words: Token ids of each word that must not be written.
    """
    for scores_V, row in zip(scores_BV, running, strict=True):
        ids = [*history, *row]
        for word in words:
            head_length = len(word) - 1
            if head_length <= len(ids) and ids[len(ids) - head_length :] == list(word[:-1]):
                scores_V[word[-1]] = -np.inf


def force_token_(scores_BV: np.ndarray, token: int) -> None:
    """Leave one token to choose, with probability 1 (`ForcedEOSToken…`)."""
    scores_BV[:] = -np.inf
    scores_BV[:, token] = 0.0


def normalize_scores(scores_BV: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of logits; some may be -inf, but not all of a row."""
    shifted_BV = scores_BV - scores_BV.max(1, keepdims=True)
    log_sums_B1: np.ndarray = np.log(np.exp(shifted_BV).sum(1, keepdims=True))
    log_probabilities_BV: np.ndarray = shifted_BV - log_sums_B1
    return log_probabilities_BV
