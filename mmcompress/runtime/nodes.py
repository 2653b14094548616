"""Each kind of node as deployed: named inputs -> named outputs, one request (or a list of texts) at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmcompress.errors import BundleError
from mmcompress.runtime.audio import AudioLike, compute_log_mel, open_audio, split_sound
from mmcompress.runtime.decode import BeamMove, Generation, beam_search, causal_mask
from mmcompress.runtime.images import preprocess_image
from mmcompress.runtime.sessions import TimedSession

Values = dict[str, Any]


def load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: not a tokenizer: {e}") from e


def pad_ids(ids: list[list[int]], length: int, pad: int, eos: int) -> np.ndarray:
    """int64 [n, length]; what is too long loses its last words, never its end token."""
    rows = [r if len(r) <= length else [*r[: length - 1], eos] for r in ids]
    return np.array([[*r, *[pad] * (length - len(r))] for r in rows], np.int64)


def padded_length(ids: list[list[int]], config: Values) -> int:
    """To what length texts are padded: the longest of them where the tower ignores padding, else its whole context."""
    whole = int(config["context_length"])
    return min(max(1, *map(len, ids)), whole) if config.get("any_length") else whole


class ImageEncoder:
    """image -> embedding float32 [1, d] of length 1, tokens float32 [1, n, w]."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.model, self.config = sessions["model"], config["preprocess"]

    def __call__(self, image: Any) -> Values:
        pixels = (
            image if isinstance(image, np.ndarray) and image.ndim == 4 else preprocess_image(image, self.config)[None]
        )
        return dict(zip(self.model.outputs, self.model({"pixels": pixels}), strict=True))


class AudioEncoder:
    """audio -> embedding float32 [k, d], tokens float32 [k, n, w]; sound longer than the window makes k windows."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.model, self.config = sessions["model"], config["features"]

    def __call__(self, audio: AudioLike) -> Values:
        pieces = split_sound(open_audio(audio), float(self.config["seconds"]))
        features = np.stack([compute_log_mel(p, self.config) for p in pieces])
        return dict(zip(self.model.outputs, self.model({"features": features}), strict=True))


class TextEncoder:
    """text (one or several) -> embedding float32 [n, d] of length 1."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.model, self.config = sessions["model"], config
        self.tokenizer = load_tokenizer(folder / config["tokenizer"])

    def __call__(self, text: str | list[str]) -> Values:
        texts = [text] if isinstance(text, str) else text
        # a thread pool costs more than a few short texts
        many = len(texts) > 16
        ids = [e.ids for e in (self.tokenizer.encode_batch(texts) if many else map(self.tokenizer.encode, texts))]
        padded = pad_ids(ids, padded_length(ids, self.config), self.config["pad"], self.config["eos"])
        return {"embedding": self.model({"ids": padded})[0]}


@dataclass(frozen=True)
class GenerationTrace:
    """What a generator wrote of one window: scored token sequences, best first, the calls of its model it took, and the
    moves of its beams between them."""

    steps: int
    sequences: tuple[tuple[float, tuple[int, ...]], ...]
    moves: tuple[BeamMove, ...] = ()


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
        given = dict(zip(self.context.outputs, self.context({"context": context}), strict=True)) if self.context else {}
        names = [n for n in self.step.inputs if n.startswith("past")]
        positions = np.arange(generation.max_tokens + 1, dtype=np.int64)
        wanted = set(self.step.inputs)
        cross = {k: v for k, v in given.items() if k in wanted and k not in names}

        def step(ids: np.ndarray, position: int, past: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
            feed = {"ids": ids, **cross}
            if "position" in wanted:  # rotary embeddings count the cache
                feed["position"] = positions[position : position + ids.shape[1]]
            if "mask" in wanted:
                feed["mask"] = causal_mask(ids.shape[1], past[0].shape[2])
            feed.update(zip(names, past, strict=True))
            scores, *new = self.step(feed)
            return scores, new

        beams = generation.beams
        start = [np.zeros((beams, h, 0, d), np.float32) for h, d in self.past]
        if names and names[0] in given:  # the context is a prefix: every beam starts from its K and V
            start = [np.repeat(given[n], beams, 0) for n in names]
        return beam_search(step, start, generation, made, follow)

    def _write(self, context: np.ndarray) -> GenerationTrace:
        before, made = self.step.calls, list[BeamMove]()
        found = self.generate(context, made=made)
        return GenerationTrace(
            self.step.calls - before, tuple((score, tuple(ids)) for score, ids in found), tuple(made)
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
        ended = [self.generation.ending(ids) for _, ids in found]
        scores = [score for score, _ in found]
        if len(windows) > 1:
            texts, scores, ended = [" ".join(texts)], [min(scores)], [next((e for e in ended if e != "end"), "end")]
        return {"text": texts[0], "texts": texts, "scores": scores, "ended": ended}


class Nearest:
    """The value whose key is nearest to the query (cosine), plus `prior` times its score where scores are given."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.prior = float(config.get("prior", 0.0))

    def __call__(self, query: np.ndarray, keys: np.ndarray, values: list[str], scores: Any = None) -> Values:
        rank = keys @ query[0]
        if scores is not None:
            rank = rank + self.prior * np.asarray(scores)
        return {"best": values[int(rank.argmax())]}


class Lookup:
    """The text of a list whose embedding is nearest to the query (cosine), with its similarity and its place."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        try:
            self.texts = json.loads((folder / config["texts"]).read_text())
            self.bank = np.load(folder / config["bank"], allow_pickle=False)
        except (OSError, ValueError) as e:
            raise BundleError(f"{folder}: the list of a lookup can't be read: {e}") from e

    def __call__(self, query: np.ndarray) -> Values:
        rank = self.bank @ query[0]
        at = int(rank.argmax())
        return {"best": self.texts[at], "score": float(rank[at]), "place": at}


DEPLOYED_KINDS: dict[str, Callable[[dict[str, TimedSession], Values, Path], Any]] = {
    "image_encoder": ImageEncoder,
    "audio_encoder": AudioEncoder,
    "text_encoder": TextEncoder,
    "text_decoder": TextDecoder,
    "nearest": Nearest,
    "lookup": Lookup,
}
