"""Quality of a deployed pipeline over input-text pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmcompress.data.base import Pairs
from mmcompress.metrics.tally import PerSampleScores
from mmcompress.records import Quality
from mmcompress.registry import METRICS
from mmcompress.runtime.pipeline import Pipeline


@dataclass(frozen=True)
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
    return PerSampleScores(tuple(np.asarray(right, dtype=float).tolist()))


def score_retrieval(a: Answers) -> dict[str, PerSampleScores]:
    """R@1 both ways; a caption that occurs twice counts as right for each of its images."""
    assert a.queries is not None and a.keys is not None
    sim = a.queries @ a.keys.T
    refs = np.array(a.references)
    return {
        "image_to_text_r1": count_right(refs[sim.argmax(1)] == refs),
        "text_to_image_r1": count_right(refs[sim.argmax(0)] == refs),
    }


def normalize_caption(text: str) -> str:
    return " ".join(text.lower().split())


def score_captions(a: Answers) -> dict[str, PerSampleScores]:
    """Exact match of the caption the pipeline chose, case and spacing aside."""
    pairs = zip(a.texts, a.references, strict=True)
    return {"caption_exact_match": count_right([normalize_caption(x) == normalize_caption(y) for x, y in pairs])}


def score_endings(a: Answers) -> dict[str, PerSampleScores]:
    """Share of texts that end by their end token: not cut off at the longest length, nor for repeating themselves."""
    return {"ends_by_itself": count_right([e == "end" for e in a.endings])}


def score_embeddings(a: Answers) -> dict[str, PerSampleScores]:
    """Share of inputs whose embedding is nearer to the dense pipeline's of the same input than to that of any other."""
    theirs = (a.dense or a).vectors
    assert a.vectors is not None and theirs is not None
    sim = a.vectors @ theirs.T
    return {"embedding_r1": count_right(sim.diagonal() >= sim.max(1) - 1e-6)}


def score_agreement(a: Answers) -> dict[str, PerSampleScores]:
    """Share of inputs for which the text found (or written) is the dense pipeline's."""
    theirs = (a.dense or a).answers
    return {"agreement": count_right([x == y for x, y in zip(a.answers, theirs, strict=True)])}


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
    first = lambda *wanted: next((n for n, k in kinds.items() if k in wanted), None)
    generator, join, compared = first("text_decoder"), first("nearest", "lookup"), first("nearest")
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
        tuple(texts), pairs.texts, tuple(found), tuple(ended), vectors=np.stack(vectors) if alone else None
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


def quality_retained(baseline: dict[str, Quality], compressed: dict[str, Quality]) -> float:
    """The smallest ratio compressed / baseline over the metrics; of an error rate, the ratio of what is right."""
    good = lambda q: max(1 - q.value, 0.0) if q.is_error_rate else q.value
    return min((good(compressed[k]) / good(b) for k, b in baseline.items() if good(b) > 0), default=0.0)
