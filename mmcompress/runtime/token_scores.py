"""What a decode step says of the next token, and the best ways to go on with it.

A step graph puts out the score of every token, and beside it the best scores of each row. All
scores of a large vocabulary take longer to copy and to rank than a small step takes to compute.

Shapes: B beams, V vocabulary, K tokens that are listed of each row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

ALL_SCORES = "scores"
"""Output of a step graph: the score of every token, float32 [B, V]."""

BEST_SCORES = "best_scores"
"""Output of a step graph: the highest scores of each row, the best first, float32 [B, K]."""

BEST_TOKENS = "best_tokens"
"""Output of a step graph: the token ids of these scores, int64 [B, K]."""

RankedOption = tuple[float, int, int]
"""A way to go on: log-probability of the whole sequence, the beam that it continues, the token that
it gets."""


class TokenScores(NamedTuple):
    """Scores of the next token of every running sequence."""

    values: np.ndarray
    """float32 [B, V] of every token; or [B, K] of the best tokens, the best first."""
    ids: np.ndarray | None = None
    """int64 [B, K]: the token ids of `values`. None: every token, in the order of its id."""

    def take_rows(self, start: int, end: int) -> TokenScores:
        """Return the scores of some sequences."""
        ids = None if self.ids is None else self.ids[start:end]
        return TokenScores(self.values[start:end], ids)


def choose_fetched_outputs(names: Sequence[str], *, needs_all_scores: bool = False) -> list[str]:
    """Choose the outputs of a graph that are fetched: all scores, or the best ones.

    Args:
        names: Every output of the graph.
        needs_all_scores: Whether the best scores are not enough.
    """
    if BEST_SCORES not in names:
        return list(names)
    unwanted = {BEST_SCORES, BEST_TOKENS} if needs_all_scores else {ALL_SCORES}
    return [name for name in names if name not in unwanted]


def count_ranked_options(beams: int, *, end_count: int) -> int:
    """Count the options that a step looks at.

    There are `end_count` + 1 times as many as beams, and at least twice as many. Even if every beam
    could end in every way, as many are left to go on.
    """
    return max(2, 1 + end_count) * beams


def rank_all_tokens(
    scores_BV: np.ndarray, running_scores: Sequence[float], *, end_count: int
) -> list[RankedOption]:
    """List the best ways to go on, the best first, from the scores of every token.

    Args:
        scores_BV: Log-probabilities of the next token.
        running_scores: Log-probabilities of the sequences so far [B].
        end_count: Tokens that end a sequence.
    """
    beams, vocabulary = scores_BV.shape
    running_scores_B1 = np.array(running_scores, np.float32)[:, None]
    totals = (scores_BV + running_scores_B1).ravel()
    option_count = min(count_ranked_options(beams, end_count=end_count), totals.size)
    best_indices = totals.argpartition(-option_count)[-option_count:]
    # a handful of numbers from here on: plain Python is quicker than arrays
    options: list[RankedOption] = []
    for score, index in zip(totals[best_indices].tolist(), best_indices.tolist(), strict=True):
        options.append((score, index // vocabulary, index % vocabulary))
    options.sort(key=get_score, reverse=True)
    return options


def rank_best_tokens(
    values_BK: np.ndarray,
    ids_BK: np.ndarray,
    *,
    running_scores: Sequence[float],
    end_count: int,
    banned_ids: Collection[int] = (),
) -> list[RankedOption]:
    """List the best ways to go on, the best first, from the best tokens of each sequence.

    Args:
        values_BK: Log-probabilities of the best next tokens, the best first.
        ids_BK: Their token ids. There are as many as options and banned tokens together, or all.
        running_scores: Log-probabilities of the sequences so far [B].
        end_count: Tokens that end a sequence.
        banned_ids: Token ids that must not follow.
    """
    option_count = count_ranked_options(len(running_scores), end_count=end_count)
    options: list[RankedOption] = []
    rows = zip(running_scores, values_BK.tolist(), ids_BK.tolist(), strict=True)
    for beam, (running_score, values, ids) in enumerate(rows):
        row_options: list[RankedOption] = []
        banned_options: list[RankedOption] = []
        for value, token in zip(values, ids, strict=True):
            if token in banned_ids:
                banned_options.append((-math.inf, beam, token))
                continue
            row_options.append((running_score + value, beam, token))
            if len(row_options) == option_count:
                break
        # Of a tiny vocabulary, what is banned fills the list: every beam needs some token.
        missing = option_count - len(row_options)
        options += row_options + banned_options[:missing]
    options.sort(key=get_score, reverse=True)
    return options[:option_count]


def get_score(scored: tuple[float, *tuple[object, ...]]) -> float:
    """Return the score that stands first."""
    return scored[0]
