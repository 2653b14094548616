"""A text decoder on ONNX Runtime: beam search around a step graph with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.beam_search import (
    GENERATION_RULES,
    BeamMove,
    beam_search,
    build_causal_mask,
    read_generation,
)
from mmcompress.runtime.check_values import Rules, require_list, require_whole_number
from mmcompress.runtime.replay import GenerationTrace
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values, load_tokenizer

SILENCE = "silence"
"""How a text ended that was never begun, since there was nothing to hear."""


class TextDecoder:
    """The tokens of another node, float32 [k, n, w], to texts, the best first.

    K and V of cross-attention are computed once a request. Several contexts are windows of one
    thing: their best texts are joined. Of no context, which is silence, it writes an empty text
    that ended by `silence`. After a call, `traces` holds what was written of each window.

    With a `replay`, a call does the work of those traces and gives their texts. It takes as many
    steps of the model, and moves its cache in the same way. Structures are then timed for the same
    work, whatever they would write. (Beams of a model that was cut and not trained yet never
    settle.)
    """

    CONFIG_RULES: ClassVar[Rules] = {
        "generation": GENERATION_RULES,
        "past": require_list(
            require_list(require_whole_number(1, 65_536), max_length=2), max_length=4096
        ),
    }
    """What the manifest may say of the configuration."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.context_session = sessions.get("context")
        self.step_session = sessions["step"]
        self.tokenizer = load_tokenizer(folder / config["tokenizer"])
        self.generation = read_generation(config["generation"])
        self.past_shapes = [(int(heads), int(width)) for heads, width in config["past"]]
        self.traces: list[GenerationTrace] = []
        self.replay: Sequence[GenerationTrace] = ()

    def __call__(self, context: np.ndarray) -> Values:
        """Write texts for k contexts [k, n, w].

        Returns:
            `text`, the best one; `texts` and `scores`, the best first; `ended`, how each ended
            (`Generation.describe_ending`).
        """
        contexts = [context[i : i + 1] for i in range(len(context))]
        if not contexts:
            self.traces = []
            return {"text": "", "texts": [""], "scores": [0.0], "ended": [SILENCE]}
        if self.replay:
            self.traces = self._repeat(contexts)
        else:
            self.traces = [self._write(window) for window in contexts]
        sequences = list(self.traces[0].sequences)
        if len(self.traces) > 1:
            sequences = [trace.sequences[0] for trace in self.traces]
        start_length = len(self.generation.start)
        texts: list[str] = []
        endings: list[str] = []
        for _, ids in sequences:
            texts.append(self.tokenizer.decode(list(ids[start_length:])).strip())
            endings.append(self.generation.describe_ending(ids))
        scores = [score for score, _ in sequences]
        if len(self.traces) > 1:
            early_endings = [ending for ending in endings if ending != "end"]
            texts = [" ".join(texts)]
            scores = [min(scores)]
            endings = early_endings[:1] or ["end"]
        return {"text": texts[0], "texts": texts, "scores": scores, "ended": endings}

    def generate(
        self,
        context: np.ndarray,
        steps: int | None = None,
        *,
        made: list[BeamMove] | None = None,
        follow: Sequence[BeamMove] = (),
    ) -> list[tuple[float, list[int]]]:
        """Write token sequences for one context.

        Args:
            context: Tokens of another node, float32 [1, n, w].
            steps: Steps to take exactly; None writes until it ends.
            made: A list that the moves of the beams are added to.
            follow: Moves to make in place of those that the scores ask for.

        Returns:
            Scored sequences of token ids, the best first.
        """
        generation = self.generation if steps is None else self.generation.set_pace(steps)
        prefill_outputs = self._prefill(context)
        past_names = [name for name in self.step_session.inputs if name.startswith("past")]
        inputs = set(self.step_session.inputs)
        positions = np.arange(generation.max_tokens + 1, dtype=np.int64)
        cross_inputs = {
            name: value
            for name, value in prefill_outputs.items()
            if name in inputs and name not in past_names
        }

        def take_step(
            ids: np.ndarray, position: int, past: list[np.ndarray]
        ) -> tuple[np.ndarray, list[np.ndarray]]:
            feed = {"ids": ids, **cross_inputs}
            if "position" in inputs:  # models with rotary embeddings count the cache instead
                feed["position"] = positions[position : position + ids.shape[1]]
            if "mask" in inputs:
                feed["mask"] = build_causal_mask(ids.shape[1], past[0].shape[2])
            feed.update(zip(past_names, past, strict=True))
            scores, *new_past = self.step_session(feed)
            return scores, new_past

        beams = generation.beams
        if past_names and past_names[0] in prefill_outputs:
            # the context is a prefix of the text: every beam starts from its K and V
            past = [np.repeat(prefill_outputs[name], beams, 0) for name in past_names]
        else:
            past = [
                np.zeros((beams, heads, 0, width), np.float32) for heads, width in self.past_shapes
            ]
        return beam_search(
            take_step,
            past,
            generation=generation,
            made_moves=made,
            moves_to_follow=follow,
        )

    def _prefill(self, context: np.ndarray) -> dict[str, np.ndarray]:
        """Return what is computed once a request: K and V of cross-attention, or of a prefix."""
        if self.context_session is None:
            return {}
        results = self.context_session({"context": context})
        return dict(zip(self.context_session.outputs, results, strict=True))

    def _write(self, context: np.ndarray) -> GenerationTrace:
        """Write freely for one context, and keep what was done."""
        calls_before = self.step_session.calls
        moves: list[BeamMove] = []
        sequences = self.generate(context, made=moves)
        return GenerationTrace(
            steps=self.step_session.calls - calls_before,
            sequences=tuple((score, tuple(ids)) for score, ids in sequences),
            moves=tuple(moves),
        )

    def _repeat(self, contexts: list[np.ndarray]) -> list[GenerationTrace]:
        """Do the work of the replay, and return its traces.

        Where there are more or fewer windows than then, they share the steps.
        """
        work = [(trace.steps, trace.moves) for trace in self.replay]
        if len(work) != len(contexts):
            all_steps = range(sum(trace.steps for trace in self.replay))
            parts = np.array_split(all_steps, len(contexts))
            work = [(max(1, len(part)), ()) for part in parts]
        for context, (steps, moves) in zip(contexts, work, strict=True):
            self.generate(context, steps, follow=moves)
        return list(self.replay)
