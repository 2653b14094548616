"""Beam search with a KV cache, step for step that of transformers' `generate`.

Shapes: B beams, T new tokens, S tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmcompress.runtime.check_values import (
    Rules,
    allow_either,
    check_flag,
    check_text,
    require_list,
    require_number,
    require_whole_number,
)
from mmcompress.runtime.score_rules import (
    ban_bad_words_,
    ban_repeated_spans_,
    force_token_,
    normalize_scores,
    penalize_repetition_,
)
from mmcompress.runtime.token_scores import (
    RankedOption,
    TokenScores,
    count_ranked_options,
    get_score,
    rank_all_tokens,
    rank_best_tokens,
)

DecodeStep = Callable[[np.ndarray, int, list[np.ndarray]], tuple[TokenScores, list[np.ndarray]]]
"""Runs the model on new tokens.

It takes ids int64 [B, T], the position of the first of them, and the cache (batch axis first). It
returns log-probabilities after the last token, and the new cache.
"""

BeamMove = tuple[tuple[int, ...], tuple[int, ...]]
"""One step of all beams: the beam that each new sequence continues, and the token that it gets."""

ScoredSequence = tuple[float, list[int]]
"""Log-probability over length (see `length_penalty`), and the ids with prompt and end."""

MAX_REPEATED_SPAN = 16
"""Tokens: the longest span whose repetition is looked for."""

MIN_REPEATED_COPIES = 4
"""Copies of a span in a row that count as a loop. A speaker may say a word three times."""

MIN_REPEATED_TOKENS = 16
"""Tokens that all copies of a span have at least, so that short words may be repeated more
often."""

NO_TOKEN = -1
"""In place of a token id: no token."""

MASKED_SCORE = -1e9
"""Added to the score of what must not be chosen or seen; finite, since -inf - -inf is no number."""

_TOKEN_ID = require_whole_number(NO_TOKEN, 2**31 - 1)
"""A token id, or no token."""

_TOKEN_IDS = require_list(require_whole_number(0, 2**31 - 1), max_length=1_000_000)
"""Token ids, as many as a vocabulary has at most."""

GENERATION_RULES: Rules = {
    "bos": _TOKEN_ID,
    "eos": allow_either(_TOKEN_ID, _TOKEN_IDS),
    "pad": _TOKEN_ID,
    "beams": require_whole_number(1, 64),
    "max_tokens": require_whole_number(1, 8192),
    "prompt": _TOKEN_IDS,
    "other_ends": _TOKEN_IDS,
    "forced_first": _TOKEN_ID,
    "forced_end": _TOKEN_ID,
    "min_tokens": require_whole_number(0, 8192),
    "early_stopping": allow_either(check_flag, check_text),
    "length_penalty": require_number(-1e3, 1e3),
    "repetition_penalty": require_number(1e-3, 1e3),
    "no_repeat_ngram_size": require_whole_number(0, 8192),
    "bad_words": require_list(_TOKEN_IDS, max_length=100_000),
    "history": _TOKEN_IDS,
    "raw_scores": check_flag,
    "suppress": _TOKEN_IDS,
    "begin_suppress": _TOKEN_IDS,
    "guard": check_flag,
}
"""What the manifest may say of a generation."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a generator writes. All of its beams are returned.

    What stands here is followed as `generate` of transformers follows the same keys of a
    `generation_config.json`.
    """

    bos: int
    """Token id: starts a sequence that has no prompt."""
    eos: int
    """Token id: ends a sequence; `NO_TOKEN`: none does."""
    pad: int
    """Token id: fills up shorter texts of a batch."""
    beams: int
    """Sequences that are followed at once."""
    max_tokens: int
    """Tokens of the longest sequence, prompt and end included."""
    prompt: tuple[int, ...] = ()
    """Token ids that every sequence starts with."""
    other_ends: tuple[int, ...] = ()
    """Further token ids that end a sequence."""
    forced_first: int = NO_TOKEN
    """Token id: follows the start in every sequence, such as the code of a language."""
    forced_end: int = NO_TOKEN
    """Token id: stands at the end of a sequence of `max_tokens`, in place of a word."""
    min_tokens: int = 0
    """Tokens of the shortest sequence, prompt included: no end token comes before."""
    early_stopping: bool | str = False
    """Whether to end with the first `beams` finished sequences.

    Otherwise, which is the default of transformers, the search ends when no running sequence can
    still beat the worst of them. `never` counts with the best length that a running one can reach.
    Early stopping saves steps. But where an end token is the only other choice, improbable ends
    fill the list before the right sequence is complete.
    """
    length_penalty: float = 1.0
    """Exponent of the length that the log-probability of a sequence is divided by."""
    repetition_penalty: float = 1.0
    """Factor that makes tokens less likely which stand in the sequence; 1 changes nothing."""
    no_repeat_ngram_size: int = 0
    """Tokens of a span that no sequence holds twice; 0 allows all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of words that are never written."""
    history: tuple[int, ...] = ()
    """Token ids ahead of the sequence that count as written, where repetition is looked for."""
    raw_scores: bool = False
    """Whether the model puts out logits: greedy search applies a repetition penalty to them."""
    suppress: tuple[int, ...] = ()
    """Token ids that are never written."""
    begin_suppress: tuple[int, ...] = ()
    """Token ids that are never written as the first one after the prompt."""
    guard: bool = False
    """Whether to end as soon as the best sequence only repeats itself. One of the copies stays."""

    @property
    def start(self) -> tuple[int, ...]:
        """Token ids that stand in every sequence before the first one is chosen."""
        start = self.prompt or (self.bos,)
        if self.forced_first != NO_TOKEN:
            start = (*start, self.forced_first)
        return start

    @property
    def ends(self) -> tuple[int, ...]:
        """Token ids that end a sequence."""
        return tuple(token for token in (self.eos, *self.other_ends) if token != NO_TOKEN)

    @property
    def bans_tokens(self) -> bool:
        """Whether some tokens must not be written, at every place or at some places."""
        return bool(self.min_tokens or self.suppress or self.begin_suppress)

    @property
    def needs_all_scores(self) -> bool:
        """Whether a rule changes scores of the model that depend on what is written."""
        return bool(
            self.repetition_penalty != 1.0
            or self.no_repeat_ngram_size
            or self.bad_words
            or self.forced_end != NO_TOKEN
            or self.raw_scores
        )

    def list_banned_ids(self, length: int) -> frozenset[int]:
        """List the token ids that must not follow a sequence.

        Args:
            length: Tokens of the sequence, prompt included.
        """
        banned_ids = set(self.suppress)
        if length < self.min_tokens:
            banned_ids.update(self.ends)
        if length == len(self.start):
            banned_ids.update(self.begin_suppress)
        return frozenset(banned_ids)

    def count_best_tokens(self) -> int:
        """Count the likeliest tokens of each beam that a step needs: options and banned tokens."""
        options = count_ranked_options(self.beams, end_count=len(self.ends))
        ever_banned = {*self.suppress, *self.begin_suppress}
        if self.min_tokens:
            ever_banned.update(self.ends)
        return options + len(ever_banned)

    def set_pace(self, steps: int) -> Generation:
        """Return the same generation, ending after exactly so many calls of the model.

        No token ends it. To suppress the end token would take time at every step, which is not to
        be measured.
        """
        return replace(
            self,
            max_tokens=len(self.start) + steps,
            eos=NO_TOKEN,
            other_ends=(),
            forced_end=NO_TOKEN,
            guard=False,
        )

    def describe_ending(self, ids: Sequence[int]) -> str:
        """Tell how a sequence ended.

        Args:
            ids: Token ids with the prompt.

        Returns:
            `end`: by its end token; `length`: at the longest length; `repetition`: by the guard.
        """
        is_full = len(ids) >= self.max_tokens
        is_forced = is_full and self.forced_end != NO_TOKEN
        if ids[-1] in self.ends and not is_forced:
            return "end"
        return "length" if is_full else "repetition"


def read_generation(settings: Mapping[str, Any]) -> Generation:
    """Read the settings of a generation as the manifest holds them, with JSON's lists."""
    fields = dict(settings)
    for key, value in settings.items():
        if isinstance(value, list):
            fields[key] = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return Generation(**fields)


def build_causal_mask(new_tokens: int, past_tokens: int) -> np.ndarray:
    """Build the mask that keeps new tokens from seeing those after them.

    Args:
        new_tokens: Tokens of this step, T.
        past_tokens: Tokens in the cache, S.

    Returns:
        float32 [1, 1, T, S + T], added to attention scores.
    """
    mask_TS = np.zeros((new_tokens, past_tokens + new_tokens), np.float32)
    if new_tokens > 1:
        masked = np.full((new_tokens, new_tokens), MASKED_SCORE, np.float32)
        mask_TS[:, past_tokens:] = np.triu(masked, 1)
    return mask_TS[None, None]


def count_repeated_tail(ids: Sequence[int]) -> int:
    """Count the tokens at the end that only repeat those before them.

    A loop is a span of up to `MAX_REPEATED_SPAN` tokens that stands at the end
    `MIN_REPEATED_COPIES` times or more, over `MIN_REPEATED_TOKENS` tokens or more.

    Args:
        ids: Token ids without the prompt.

    Returns:
        Tokens of all copies but the first; 0 where nothing is repeated.
    """
    for span in range(1, MAX_REPEATED_SPAN + 1):
        copies = max(MIN_REPEATED_COPIES, -(-MIN_REPEATED_TOKENS // span))
        repeated_tokens = span * (copies - 1)
        if len(ids) < span * copies:
            continue
        if all(ids[-i] == ids[-i - span] for i in range(1, repeated_tokens + 1)):
            return repeated_tokens
    return 0


class BeamSearch:
    """The search for the best sequences of one item: it looks at scores, and says how to go on.

    What runs the model may hold several searches, and give every one its own rows of the scores.

    Args:
        generation: How to write.
        made_moves: A list that every move is appended to.
        moves_to_follow: Moves to make in place of those that the scores ask for, one for each step
            but the last.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        made_moves: list[BeamMove] | None = None,
        moves_to_follow: Sequence[BeamMove] = (),
    ):
        self.generation = generation
        self.made_moves = made_moves
        self.moves_to_follow = moves_to_follow
        # What stays the same is asked once: a step of a small model takes some 100 microseconds.
        self.beams = generation.beams
        self.start = list(generation.start)
        self.ends = frozenset(generation.ends)
        self.has_rules = generation.needs_all_scores or generation.bans_tokens
        self.running = [self.start] * self.beams
        # All beams start alike, so only one of them may be continued in the first step.
        self.scores = [0.0] + [MASKED_SCORE] * (self.beams - 1)
        self.finished: list[ScoredSequence] = []
        """The best sequences that have ended, the best first."""
        self.position = len(self.start)
        """Tokens that the model has read."""
        self.step = 0
        """Moves that were made."""

    def advance(self, scores: TokenScores) -> BeamMove | None:
        """Choose how to go on.

        Args:
            scores: Log-probabilities of the next token of every running sequence.

        Returns:
            The move of the beams; None at the end: `finished` holds the result.
        """
        generation = self.generation
        beams = self.beams
        options = self._rank_options(scores)
        is_last = self.position + 1 >= generation.max_tokens
        length = self.position + 1 - len(generation.prompt or (generation.bos,))
        # Only the first options may end: an end token further down is not probable enough.
        ending = options[:beams]
        if not is_last:
            ending = [option for option in ending if option[2] in self.ends]
        if ending:
            self.finished = _add_finished(
                self.finished, ending, running=self.running, generation=generation, length=length
            )
        if is_last:
            return None
        unfinished = [option for option in options if option[2] not in self.ends]
        unfinished = unfinished[:beams]
        if _is_settled(self.finished, unfinished, generation=generation, length=length):
            return None
        self.scores = [score for score, _, _ in unfinished]
        beam_order = tuple(beam for _, beam, _ in unfinished)
        tokens = tuple(token for _, _, token in unfinished)
        move = (beam_order, tokens)
        if self.moves_to_follow:
            move = self.moves_to_follow[self.step]
        self.step += 1
        self.position += 1
        self.running = _extend_sequences(self.running, move)
        if generation.guard and self._end_repetition(length):
            return None
        if self.made_moves is not None:
            self.made_moves.append(move)
        return move

    def _rank_options(self, scores: TokenScores) -> list[RankedOption]:
        """List the best ways to go on that the rules allow, the best first."""
        end_count = len(self.ends)
        if scores.ids is None:
            scores_BV = scores.values
            if self.has_rules:
                scores_BV = _follow_rules(scores_BV, self.generation, running=self.running)
            return rank_all_tokens(scores_BV, self.scores, end_count=end_count)
        banned_ids: frozenset[int] = frozenset()
        if self.has_rules:
            banned_ids = self.generation.list_banned_ids(self.position)
        return rank_best_tokens(
            scores.values,
            scores.ids,
            running_scores=self.scores,
            end_count=end_count,
            banned_ids=banned_ids,
        )

    def _end_repetition(self, length: int) -> bool:
        """End the search when the best sequence only repeats itself; returns whether it does."""
        repeated_tokens = count_repeated_tail(self.running[0][len(self.start) :])
        if not repeated_tokens:
            return False
        divisor = length**self.generation.length_penalty
        means = [score / divisor for score in self.scores]
        self.running[0] = self.running[0][:-repeated_tokens]
        ended_sequences = list(zip(means, self.running, strict=True))
        self.finished = _take_best([*self.finished, *ended_sequences], self.beams)
        return True


def beam_search(
    decode_step: DecodeStep,
    past: list[np.ndarray],
    *,
    generation: Generation,
    made_moves: list[BeamMove] | None = None,
    moves_to_follow: Sequence[BeamMove] = (),
) -> list[ScoredSequence]:
    """Write the best sequences of one item.

    Args:
        decode_step: Runs the model on new tokens.
        past: The cache before the first step, batch axis first.
        generation: How to write.
        made_moves: A list that every move is appended to.
        moves_to_follow: Moves to make in place of those that the scores ask for, one for each step
            but the last.

    Returns:
        `generation.beams` sequences, the best first.
    """
    search = BeamSearch(generation, made_moves=made_moves, moves_to_follow=moves_to_follow)
    unmoved_beams = tuple(range(search.beams))
    new_ids_BT = np.array(search.running, np.int64)
    position = 0
    while True:
        scores, past = decode_step(new_ids_BT, position, past)
        position += new_ids_BT.shape[1]
        move = search.advance(scores)
        if move is None:
            return search.finished
        beams, tokens = move
        if beams != unmoved_beams:
            # the cache goes along with the beams
            order = np.array(beams)
            past = [cache.take(order, 0) for cache in past]
        new_ids_BT = np.array(tokens, np.int64)[:, None]


def search_together(
    decode_step: DecodeStep,
    past: list[np.ndarray],
    *,
    searches: Sequence[BeamSearch],
    drop_rows: Callable[[np.ndarray], None],
) -> None:
    """Write the best sequences of several items, all in one call of the model a step.

    An item that has ended leaves the calls. Every search holds what it has found.

    Args:
        decode_step: Runs the model on new tokens. B is beams times items, item after item.
        past: The cache before the first step, batch axis first.
        searches: One for each item, all with as many beams and the same start.
        drop_rows: Called with the rows [r] that stay, whenever an item has left.
    """
    active = list(searches)
    new_ids_BT = np.array([ids for search in active for ids in search.running], np.int64)
    position = 0
    while active:
        scores, past = decode_step(new_ids_BT, position, past)
        position += new_ids_BT.shape[1]
        going_on: list[BeamSearch] = []
        source_rows: list[int] = []
        kept_rows: list[int] = []
        tokens: list[int] = []
        first_row = 0
        for search in active:
            end_row = first_row + search.beams
            move = search.advance(scores.take_rows(first_row, end_row))
            if move is not None:
                going_on.append(search)
                kept_rows += range(first_row, end_row)
                source_rows += [first_row + beam for beam in move[0]]
                tokens += move[1]
            first_row = end_row
        if len(going_on) < len(active):
            drop_rows(np.array(kept_rows, np.int64))
        active = going_on
        if source_rows != list(range(first_row)):
            order = np.array(source_rows, np.int64)
            past = [cache.take(order, 0) for cache in past]
        new_ids_BT = np.array(tokens, np.int64)[:, None]


def _follow_rules(
    scores_BV: np.ndarray, generation: Generation, *, running: Sequence[list[int]]
) -> np.ndarray:
    """Return log-probabilities after the rules of a generation, which change the scores in place.

    The rules follow each other as in transformers: a forced token undoes what was banned before.
    """
    length = len(running[0])
    if generation.repetition_penalty != 1.0:
        penalize_repetition_(
            scores_BV,
            running,
            history=generation.history,
            penalty=generation.repetition_penalty,
        )
    if generation.no_repeat_ngram_size:
        ban_repeated_spans_(
            scores_BV,
            running,
            history=generation.history,
            size=generation.no_repeat_ngram_size,
        )
    if generation.bad_words:
        ban_bad_words_(scores_BV, running, history=generation.history, words=generation.bad_words)
    if length < generation.min_tokens and generation.ends:
        scores_BV[:, generation.ends] = -np.inf
    if generation.forced_end != NO_TOKEN and length == generation.max_tokens - 1:
        force_token_(scores_BV, generation.forced_end)
    if generation.suppress:
        scores_BV[:, generation.suppress] = -np.inf
    if generation.begin_suppress and length == len(generation.start):
        scores_BV[:, generation.begin_suppress] = -np.inf
    return normalize_scores(scores_BV) if generation.raw_scores else scores_BV


def _add_finished(
    finished: list[ScoredSequence],
    ending: Sequence[RankedOption],
    *,
    running: Sequence[list[int]],
    generation: Generation,
    length: int,
) -> list[ScoredSequence]:
    """Add the sequences that end in this step, and keep the best."""
    divisor = length**generation.length_penalty
    ended: list[ScoredSequence] = []
    for score, beam, token in ending:
        ended.append((score / divisor, [*running[beam], token]))
    return _take_best([*finished, *ended], generation.beams)


def _extend_sequences(running: Sequence[list[int]], move: BeamMove) -> list[list[int]]:
    """Give every beam the sequence that it continues, and its next token."""
    beams, tokens = move
    extended_ids: list[list[int]] = []
    for beam, token in zip(beams, tokens, strict=True):
        extended_ids.append([*running[beam], token])
    return extended_ids


def _take_best(sequences: list[ScoredSequence], count: int) -> list[ScoredSequence]:
    """Return the best sequences, the best first."""
    return sorted(sequences, key=get_score, reverse=True)[:count]


def _is_settled(
    finished: Sequence[ScoredSequence],
    unfinished: Sequence[RankedOption],
    *,
    generation: Generation,
    length: int,
) -> bool:
    """Return whether enough sequences are finished, and no running one beats the worst of them."""
    if len(finished) < generation.beams:
        return False
    if generation.early_stopping is True:
        return True
    worst_score = finished[-1][0]
    if generation.early_stopping == "never" and generation.length_penalty > 0:
        length = generation.max_tokens - len(generation.prompt or (generation.bos,))
    divisor: float = length**generation.length_penalty
    best_running_score = unfinished[0][0] / divisor
    return best_running_score <= worst_score
