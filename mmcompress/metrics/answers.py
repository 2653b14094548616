"""Quality of a deployed pipeline over input-text pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmcompress.data.base import Pairs
from mmcompress.graph.ports import kind_of
from mmcompress.registry import METRICS
from mmcompress.runtime.graph import Pipeline
from mmcompress.stats import PerSampleScores


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a pipeline said to every input.

    `texts`: its caption, or what it heard; `answers`: the text it found, or where it looks for none, that it wrote;
    `ended`: how the generator's best text ended. Where it joins two towers: embeddings of the inputs and of the
    reference texts, both [n, d]; `vectors` [n, d]: those that no join compares, of length 1, side by side.
    """

    texts: tuple[str, ...]
    references: tuple[str, ...]
    answers: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    queries: np.ndarray | None = None
    keys: np.ndarray | None = None
    vectors: np.ndarray | None = None
    dense: Answers | None = None
    """The same of the dense pipeline; None: this is the dense one."""


def count_right(right: np.ndarray | Sequence[bool]) -> PerSampleScores:
    """A share of the inputs."""
    return PerSampleScores(numerators=tuple(np.asarray(right, dtype=float).tolist()))


def _unit(embedding: np.ndarray) -> np.ndarray:
    """[d] of [k, d], the windows of one input: their mean, of length 1."""
    mean = embedding.mean(0)
    return mean / max(float(np.linalg.norm(mean)), 1e-9)


def answer_pairs(
    pipeline: Pipeline,
    pairs: Pairs,
    progress: Callable[[float], None] = lambda share: None,
    alone: Sequence[str] = (),
) -> Answers:
    """Every input through the whole pipeline, one request each; the references through its text encoder.

    `alone`: encoders whose embeddings are `vectors`.
    """
    kinds = {n: node["kind"] for n, node in pipeline.manifest["graph"]["nodes"].items()}
    generator = next((n for n, k in kinds.items() if kind_of(k).writes_text), None)
    join = next((n for n, k in kinds.items() if kind_of(k).joins), None)
    compared = next((n for n, k in kinds.items() if kind_of(k).compared_ports), None)
    wires = pipeline.wiring[compared] if compared else {}
    texts, found, ended, queries, vectors = [], [], [], [], []
    for i, given in enumerate(pairs.inputs):
        values = pipeline.run(**{next(iter(pipeline.inputs)): given})
        written = values[generator]["text"] if generator else ""
        best = values[join]["best"] if join else written
        found.append(best)
        texts.append(best if compared or not generator else written)
        ended.append(values[generator]["ended"][0] if generator else "end")
        if compared:
            queries.append(values[wires["query"].split(".")[0]]["embedding"][0])
        if alone:
            vectors.append(np.concatenate([_unit(values[n]["embedding"]) for n in alone]))
        if i % 50 == 0:
            progress(i / len(pairs))
    common = Answers(
        texts=tuple(texts),
        references=pairs.texts,
        answers=tuple(found),
        endings=tuple(ended),
        vectors=np.stack(vectors) if alone else None,
    )
    if not compared:
        return common
    encoder = pipeline.nodes[wires["keys"].split(".")[0]]
    keys = [encoder(list(pairs.texts[i : i + 100]))["embedding"] for i in range(0, len(pairs), 100)]
    return Answers(**{**vars(common), "queries": np.stack(queries), "keys": np.concatenate(keys)})


def score_answers(answers: Answers, metrics: Sequence[str]) -> dict[str, PerSampleScores]:
    """All metrics of a spec, by name of their figures."""
    found: dict[str, PerSampleScores] = {}
    for name in metrics:
        found |= METRICS.get(name)(answers)
    return found
