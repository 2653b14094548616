"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmcompress.runtime.beam_search import BeamMove, Generation, beam_search, build_causal_mask
from mmcompress.runtime.replay import GenerationTrace
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values, load_tokenizer


class TextDecoder:
    """context float32 [k, n, w] -> texts, the best first. Cross-attention K and V are computed once a request.

    Several contexts are windows of one thing: their best texts are joined. `ended`: see `Generation.ending`. After a
    call `written` holds what was written of each window; what is `dictated` is given back in its place, after as many
    calls of the model as that took, and the same moves of its cache: structures are then timed for the same work,
    whatever they would say. (Beams of one that was cut and not trained yet never settle.)
    """

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.context, self.step = sessions.get("context"), sessions["step"]
        self.tokenizer = load_tokenizer(folder / config["tokenizer"])
        g = dict(config["generation"])
        options: Values = {k: tuple(v) if isinstance(v, list) else v for k, v in g.items()}
        self.generation = Generation(**options)
        self.past = [(int(h), int(d)) for h, d in config["past"]]
        self.traces: list[GenerationTrace] = []
        self.replay: Sequence[GenerationTrace] = ()

    def generate(
        self,
        context: np.ndarray,
        steps: int | None = None,
        made: list[BeamMove] | None = None,
        follow: Sequence[BeamMove] = (),
    ) -> list[tuple[float, list[int]]]:
        """Scored token sequences of one item, the best first; of exactly as many `steps` where they are given.

        `made`, `follow`: see `beam_search`.
        """
        generation = self.generation if steps is None else self.generation.paced(steps)
        given = (
            dict(zip(self.context.outputs, self.context({"context": context}), strict=True))
            if self.context
            else {}
        )
        names = [n for n in self.step.inputs if n.startswith("past")]
        positions = np.arange(generation.max_tokens + 1, dtype=np.int64)
        wanted = set(self.step.inputs)
        cross = {k: v for k, v in given.items() if k in wanted and k not in names}

        def step(
            ids: np.ndarray, position: int, past: list[np.ndarray]
        ) -> tuple[np.ndarray, list[np.ndarray]]:
            feed = {"ids": ids, **cross}
            if "position" in wanted:  # rotary embeddings count the cache
                feed["position"] = positions[position : position + ids.shape[1]]
            if "mask" in wanted:
                feed["mask"] = build_causal_mask(ids.shape[1], past[0].shape[2])
            feed.update(zip(names, past, strict=True))
            scores, *new = self.step(feed)
            return scores, new

        beams = generation.beams
        start = [np.zeros((beams, h, 0, d), np.float32) for h, d in self.past]
        if (
            names and names[0] in given
        ):  # the context is a prefix: every beam starts from its K and V
            start = [np.repeat(given[n], beams, 0) for n in names]
        return beam_search(step, start, g=generation, made=made, follow=follow)

    def _write(self, context: np.ndarray) -> GenerationTrace:
        before, made = self.step.calls, list[BeamMove]()
        found = self.generate(context, made=made)
        return GenerationTrace(
            steps=self.step.calls - before,
            sequences=tuple((score, tuple(ids)) for score, ids in found),
            moves=tuple(made),
        )

    def _take(self, contexts: list[np.ndarray]) -> list[GenerationTrace]:
        """What is dictated, after the steps it took; where windows are shorter than they were, they share them."""
        work: list[tuple[int, tuple[BeamMove, ...]]] = [(w.steps, w.moves) for w in self.replay]
        if len(work) != len(contexts):
            shares = np.array_split(range(sum(steps for steps, _ in work)), len(contexts))
            work = [(max(1, len(part)), ()) for part in shares]
        for context, (steps, moves) in zip(contexts, work, strict=True):
            self.generate(context, steps, follow=moves)
        return list(self.replay)

    def __call__(self, context: np.ndarray) -> Values:
        contexts = [context[i : i + 1] for i in range(len(context))]
        self.traces = self._take(contexts) if self.replay else [self._write(c) for c in contexts]
        windows = [w.sequences for w in self.traces]
        found = windows[0] if len(windows) == 1 else [w[0] for w in windows]
        given = len(self.generation.prompt)
        texts = [self.tokenizer.decode(list(ids[given:])).strip() for _, ids in found]
        ended = [self.generation.describe_ending(ids) for _, ids in found]
        scores = [score for score, _ in found]
        if len(windows) > 1:
            texts, scores, ended = (
                [" ".join(texts)],
                [min(scores)],
                [next((e for e in ended if e != "end"), "end")],
            )
        return {"text": texts[0], "texts": texts, "scores": scores, "ended": ended}
