"""A text decoder on ONNX Runtime: beam search around a step graph with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.beam_search import (
    GENERATION_RULES,
    BeamMove,
    BeamSearch,
    beam_search,
    build_causal_mask,
    read_generation,
    search_together,
)
from mmcompress.runtime.check_values import Rules, require_list, require_whole_number
from mmcompress.runtime.replay import GenerationTrace
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values, load_tokenizer
from mmcompress.runtime.token_scores import (
    ALL_SCORES,
    BEST_SCORES,
    BEST_TOKENS,
    TokenScores,
    choose_fetched_outputs,
)

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
        self.step_outputs = choose_fetched_outputs(
            self.step_session.outputs,
            needs_all_scores=self.generation.needs_all_scores or not self._lists_enough_tokens(),
        )
        self.traces: list[GenerationTrace] = []
        self.replay: Sequence[GenerationTrace] = ()

    def _lists_enough_tokens(self) -> bool:
        """Return whether the step graph lists as many of the best tokens as a step needs."""
        shapes = self.step_session.output_shapes
        if BEST_SCORES not in shapes:
            return False
        _, listed_tokens = shapes[BEST_SCORES]
        _, vocabulary = shapes[ALL_SCORES]
        needed_tokens = self.generation.count_best_tokens()
        return bool(listed_tokens == vocabulary or listed_tokens >= needed_tokens)

    def __call__(self, context: np.ndarray) -> Values:
        """Write texts for k contexts [k, n, w].

        Returns:
            `text`, the best one; `texts` and `scores`, the best first; `ended`, how each ended
            (`Generation.describe_ending`).
        """
        return self.answer_batch([{"context": context}])[0]

    def answer_batch(self, requests: Sequence[Values]) -> list[Values]:
        """Write texts for several requests: what one step of all of them needs is one call.

        Args:
            requests: A `context` each, as `__call__` takes it.
        """
        windows: list[np.ndarray] = []
        for request in requests:
            context = request["context"]
            windows += [context[i : i + 1] for i in range(len(context))]
        if self.replay and windows:
            self._repeat(windows, is_batch=len(requests) > 1)
            # What it wrote at another pace counts for nothing.
            self.traces = list(self.replay)
        else:
            self.traces = self._write(windows, is_batch=len(requests) > 1)
        return self._divide_traces([len(request["context"]) for request in requests])

    def _divide_traces(self, window_counts: Sequence[int]) -> list[Values]:
        """Return the values of every request, from the traces of all windows.

        A replay of another number of windows gives each request its share of the traces.
        """
        if sum(window_counts) != len(self.traces):
            parts = np.array_split(np.arange(len(self.traces)), len(window_counts))
            window_counts = [len(part) for part in parts]
        values: list[Values] = []
        start = 0
        for count in window_counts:
            values.append(self._describe(self.traces[start : start + count]))
            start += count
        return values

    def _describe(self, traces: Sequence[GenerationTrace]) -> Values:
        """Return the values of one request, from what was written of its windows."""
        if not traces:
            return {"text": "", "texts": [""], "scores": [0.0], "ended": [SILENCE]}
        sequences = list(traces[0].sequences)
        if len(traces) > 1:
            sequences = [trace.sequences[0] for trace in traces]
        start_length = len(self.generation.start)
        texts: list[str] = []
        endings: list[str] = []
        for _, ids in sequences:
            texts.append(self.tokenizer.decode(list(ids[start_length:])).strip())
            endings.append(self.generation.describe_ending(ids))
        scores = [score for score, _ in sequences]
        if len(traces) > 1:
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
        model = _StepModel(self, context)
        return beam_search(
            model.take_step,
            model.make_past(),
            generation=generation,
            made_moves=made,
            moves_to_follow=follow,
        )

    def _generate_together(
        self, windows: Sequence[np.ndarray], searches: Sequence[BeamSearch]
    ) -> None:
        """Run the searches of several contexts [1, n, w] of the same size."""
        model = _StepModel(self, np.concatenate(windows))
        model.give_each_beam_its_context()
        search_together(
            model.take_step, model.make_past(), searches=searches, drop_rows=model.keep_rows
        )

    def _write(self, windows: Sequence[np.ndarray], *, is_batch: bool) -> list[GenerationTrace]:
        """Write freely for some contexts, and keep what was done."""
        moves: list[list[BeamMove]] = [[] for _ in windows]
        if is_batch:
            searches = [BeamSearch(self.generation, made_moves=made) for made in moves]
            for places in _group_by_shape(windows):
                alike_windows = [windows[place] for place in places]
                self._generate_together(alike_windows, [searches[place] for place in places])
            found = [search.finished for search in searches]
        else:
            found = [
                self.generate(window, made=made)
                for window, made in zip(windows, moves, strict=True)
            ]
        traces: list[GenerationTrace] = []
        for sequences, made in zip(found, moves, strict=True):
            traces.append(
                GenerationTrace(
                    # The last step moves no beam.
                    steps=len(made) + 1,
                    sequences=tuple((score, tuple(ids)) for score, ids in sequences),
                    moves=tuple(made),
                )
            )
        return traces

    def _repeat(self, windows: Sequence[np.ndarray], *, is_batch: bool) -> None:
        """Do the work of the replay.

        Where there are more or fewer windows than then, they share the steps.
        """
        work = [(trace.steps, trace.moves) for trace in self.replay]
        if len(work) != len(windows):
            all_steps = range(sum(trace.steps for trace in self.replay))
            parts = np.array_split(all_steps, len(windows))
            work = [(max(1, len(part)), ()) for part in parts]
        if not is_batch:
            for window, (steps, moves) in zip(windows, work, strict=True):
                self.generate(window, steps, follow=moves)
            return
        for places in _group_by_shape(windows):
            searches: list[BeamSearch] = []
            for place in places:
                steps, moves = work[place]
                generation = self.generation.set_pace(steps)
                searches.append(BeamSearch(generation, moves_to_follow=moves))
            self._generate_together([windows[place] for place in places], searches)


class _StepModel:
    """The step graph of a decoder with what is computed once for some contexts."""

    def __init__(self, decoder: TextDecoder, context: np.ndarray):
        """Compute K and V of cross-attention, or of a prefix, for k contexts [k, n, w]."""
        self.session = decoder.step_session
        self.outputs = decoder.step_outputs
        self.lists_best_tokens = BEST_TOKENS in decoder.step_outputs
        self.beams = decoder.generation.beams
        self.past_shapes = decoder.past_shapes
        self.rows = self.beams * len(context)
        self.inputs = set(self.session.inputs)
        self.past_names = [name for name in self.session.inputs if name.startswith("past")]
        self.prefilled: dict[str, np.ndarray] = {}
        if decoder.context_session is not None:
            results = decoder.context_session({"context": context})
            names = decoder.context_session.outputs
            self.prefilled = dict(zip(names, results, strict=True))
        self.cross_inputs = {
            name: value
            for name, value in self.prefilled.items()
            if name in self.inputs and name not in self.past_names
        }

    def make_past(self) -> list[np.ndarray]:
        """Make the cache before the first step, one row for each beam of each context."""
        if self.past_names and self.past_names[0] in self.prefilled:
            # the context is a prefix of the text: every beam starts from its K and V
            return [np.repeat(self.prefilled[name], self.beams, 0) for name in self.past_names]
        return [
            np.zeros((self.rows, heads, 0, width), np.float32) for heads, width in self.past_shapes
        ]

    def give_each_beam_its_context(self) -> None:
        """Repeat K and V of the contexts for every beam. Of one context, all beams share them."""
        for name, value in self.cross_inputs.items():
            self.cross_inputs[name] = np.repeat(value, self.beams, 0)

    def keep_rows(self, rows: np.ndarray) -> None:
        """Keep the contexts of some rows [r] alone."""
        for name, value in self.cross_inputs.items():
            self.cross_inputs[name] = value.take(rows, 0)

    def take_step(
        self, ids: np.ndarray, position: int, past: list[np.ndarray]
    ) -> tuple[TokenScores, list[np.ndarray]]:
        """Run the model on new tokens; see `runtime.beam_search.DecodeStep`."""
        feed = {"ids": ids, **self.cross_inputs}
        if "position" in self.inputs:  # models with rotary embeddings count the cache instead
            feed["position"] = np.arange(position, position + ids.shape[1], dtype=np.int64)
        if "mask" in self.inputs:
            feed["mask"] = build_causal_mask(ids.shape[1], past[0].shape[2])
        feed.update(zip(self.past_names, past, strict=True))
        results = self.session(feed, self.outputs)
        if self.lists_best_tokens:
            values_BK, ids_BK, *new_past = results
            return TokenScores(values_BK, ids_BK), new_past
        scores_BV, *new_past = results
        return TokenScores(scores_BV), new_past


def _group_by_shape(windows: Sequence[np.ndarray]) -> list[list[int]]:
    """Group the places of contexts that have the same size: one call takes those together."""
    places_by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, window in enumerate(windows):
        places_by_shape.setdefault(window.shape, []).append(place)
    return list(places_by_shape.values())
