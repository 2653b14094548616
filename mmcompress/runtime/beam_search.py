"""Beam search with a KV cache, step for step that of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

DecodeStep = Callable[[np.ndarray, int, list[np.ndarray]], tuple[np.ndarray, list[np.ndarray]]]
"""(ids [b, t], position of the first, past) -> (log-probabilities [b, v] after the last token, new past)."""


BeamMove = tuple[tuple[int, ...], tuple[int, ...]]
"""From one step to the next: which running sequence each of the next ones goes on with, and the token it gets."""


LONGEST_SPAN, COPIES, TOKENS = 16, 4, 16


NONE = -1
"""No token."""


FAR = -1e9
"""What is added to the score of a position that must not be seen."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How to generate: special ids, beams (all of them are returned), the longest sequence in tokens, prompt.

    `early_stopping`: end with the first `beams` finished sequences; otherwise (transformers' default) only when no
    running one can still beat the worst of them. The first saves steps, but where an end token is the only other
    choice, ends that nobody believes in fill the list before the right sequence is complete.
    """

    bos: int
    eos: int
    pad: int
    beams: int
    max_tokens: int
    prompt: tuple[int, ...] = ()
    early_stopping: bool = False
    suppress: tuple[int, ...] = ()
    """Tokens never written; `begin_suppress`: never as the first one after the prompt."""
    begin_suppress: tuple[int, ...] = ()
    guard: bool = False
    """End as soon as the best sequence does nothing but repeat itself; of the copies one stays."""

    def paced(self, steps: int) -> Generation:
        """The same, writing exactly as long as `steps` calls of the model take, whatever it says.

        No token ends it: to suppress the one that does would take time at every step, which is not to be measured.
        """
        longest = len(self.prompt or (self.bos,)) + steps
        return replace(self, max_tokens=longest, eos=NONE, guard=False)

    def describe_ending(self, ids: Sequence[int]) -> str:
        """How a sequence ended: by its `end` token, at the longest `length`, or by the guard against `repetition`."""
        return (
            "end"
            if ids[-1] == self.eos
            else "length"
            if len(ids) >= self.max_tokens
            else "repetition"
        )


def build_causal_mask(new: int, past: int) -> np.ndarray:
    """float32 [1, 1, new, past + new], added to attention scores: none of the new tokens sees those after it."""
    mask = np.zeros((new, past + new), np.float32)
    if new > 1:
        mask[:, past:] = np.triu(np.full((new, new), FAR, np.float32), 1)
    return mask[None, None]


def count_repeated_tail(ids: Sequence[int]) -> int:
    """Tokens at the end that only repeat those before them: a span said four times or more, over 16 tokens or more."""
    for span in range(1, LONGEST_SPAN + 1):
        copies = max(COPIES, -(-TOKENS // span))
        if len(ids) >= span * copies and all(
            ids[-i] == ids[-i - span] for i in range(1, span * (copies - 1) + 1)
        ):
            return span * (copies - 1)
    return 0


def beam_search(
    step: DecodeStep,
    past: list[np.ndarray],
    *,
    g: Generation,
    made: list[BeamMove] | None = None,
    follow: Sequence[BeamMove] = (),
) -> list[tuple[float, list[int]]]:
    """The `g.beams` best sequences of one item, best first, as (score per token, ids with prompt and end).

    `past` is the empty cache, batch axis first: beams are gathered along it. The moves are added to `made`; those to
    `follow` are made in place of what the scores say, of which there must be one for every step but the last.
    """
    start = list(g.prompt or (g.bos,))
    running = [start] * g.beams
    scores = [0.0] + [-1e9] * (g.beams - 1)
    unmoved = tuple(range(g.beams))
    finished: list[tuple[float, list[int]]] = []
    feed, position = np.array([start] * g.beams, np.int64), 0
    while True:
        scored, past = step(feed, position, past)
        position += feed.shape[1]
        if g.suppress:
            scored[:, g.suppress] = -np.inf
        if g.begin_suppress and position == len(start):
            scored[:, g.begin_suppress] = -np.inf
        flat = (scored + np.array(scores, np.float32)[:, None]).ravel()
        vocabulary = scored.shape[1]
        keep = min(2 * g.beams, flat.size)
        top = flat.argpartition(-keep)[-keep:]
        # a handful of numbers from here on: plain Python is quicker than arrays
        ranked = sorted(zip(flat[top].tolist(), top.tolist(), strict=True), key=lambda r: -r[0])
        options = [(score, *divmod(index, vocabulary)) for score, index in ranked]
        last = position + 1 >= g.max_tokens
        length = position + 1 - len(start)
        for score, beam, token in options[: g.beams]:
            if last or token == g.eos:
                finished.append((score / length, [*running[beam], token]))
        finished = sorted(finished, key=lambda f: -f[0])[: g.beams]
        if last:
            break
        alive = [o for o in options if o[2] != g.eos][: g.beams]
        if len(finished) == g.beams and (
            g.early_stopping or alive[0][0] / length <= finished[-1][0]
        ):
            break
        scores = [score for score, _, _ in alive]
        beams, tokens = zip(*((beam, token) for _, beam, token in alive), strict=True)
        if follow:
            beams, tokens = follow[length - 1]
        running = [[*running[beam], token] for beam, token in zip(beams, tokens, strict=True)]
        if g.guard and (copies := count_repeated_tail(running[0][len(start) :])):
            cut = [(s / length, r) for s, r in zip(scores, running, strict=True)]
            cut[0] = (cut[0][0], running[0][:-copies])
            return sorted([*finished, *cut], key=lambda f: -f[0])[: g.beams]
        if made is not None:
            made.append((beams, tokens))
        if beams != unmoved:
            order = np.array(beams)
            past = [p.take(order, 0) for p in past]
        feed = np.array(tokens, np.int64)[:, None]
    return finished
