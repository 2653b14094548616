"""Beam search with a KV cache, step for step that of transformers' `generate(early_stopping=True)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Step = Callable[[np.ndarray, int, list[np.ndarray]], tuple[np.ndarray, list[np.ndarray]]]
"""(ids [b, t], position of the first, past) -> (log-probabilities [b, v] after the last token, new past)."""


@dataclass(frozen=True)
class Generation:
    """How to generate: special ids, beams (all of them are returned), the longest sequence in tokens, prompt."""

    bos: int
    eos: int
    pad: int
    beams: int
    max_tokens: int
    prompt: tuple[int, ...] = ()


def beam_search(step: Step, past: list[np.ndarray], g: Generation) -> list[tuple[float, list[int]]]:
    """The `g.beams` best sequences of one item, best first, as (score per token, ids with prompt and end).

    `past` is the empty cache, batch axis first: beams are gathered along it.
    """
    start = list(g.prompt or (g.bos,))
    running = [start] * g.beams
    scores = np.full(g.beams, -1e9, np.float32)
    scores[0] = 0
    finished: list[tuple[float, list[int]]] = []
    feed, position = np.array([start] * g.beams, np.int64), 0
    while True:
        scored, past = step(feed, position, past)
        position += feed.shape[1]
        flat = (scored + scores[:, None]).ravel()
        keep = min(2 * g.beams, flat.size)
        top = flat.argpartition(-keep)[-keep:]
        top = top[flat[top].argsort()[::-1]]
        beam, token = np.divmod(top, scored.shape[1])
        last = position + 1 >= g.max_tokens
        ends = (token == g.eos) | last
        length = position + 1 - len(start)
        for rank in np.flatnonzero(ends[: g.beams]):
            finished.append((float(flat[top[rank]]) / length, [*running[beam[rank]], int(token[rank])]))
        finished = sorted(finished, key=lambda f: -f[0])[: g.beams]
        if len(finished) == g.beams or last:
            break
        alive = np.flatnonzero(~ends)[: g.beams]
        running = [[*running[beam[i]], int(token[i])] for i in alive]
        scores = flat[top[alive]]
        if not np.array_equal(beam[alive], np.arange(g.beams)):
            past = [p[beam[alive]] for p in past]
        feed = token[alive][:, None].astype(np.int64)
    return finished
