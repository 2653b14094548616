"""What a deployed pipeline answers to a split, node by node, and how metrics score it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmcompress.data.base import Pairs
from mmcompress.graph.inputs import make_request
from mmcompress.graph.judged_nodes import find_judged_nodes
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import name_by_node, parse_reference
from mmcompress.registry import METRICS
from mmcompress.runtime.graph import Pipeline
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.spec.schema import Spec
from mmcompress.stats import PerSampleScores

ENCODE_BATCH = 100
"""Reference texts that are embedded at once."""

PROGRESS_EVERY = 50
"""Inputs between two messages of progress."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one node of a pipeline answered to every input of a split. A metric judges this."""

    references: tuple[str, ...]
    """The text that belongs to each input."""
    texts: tuple[str, ...] = ()
    """The text that the node wrote or found."""
    endings: tuple[str, ...] = ()
    """How the best text of a generator ended: `end`, `length`, `repetition` or `silence`."""
    queries: np.ndarray | None = None
    """Embeddings of the inputs [n, d], when the node compares two embeddings."""
    keys: np.ndarray | None = None
    """Embeddings of the reference texts [n, d], when the node compares two embeddings."""
    vectors: np.ndarray | None = None
    """Embeddings of the node [n, d], each of length 1, when no join compares them."""
    windows: tuple[int, ...] = ()
    """Windows that each input was heard in; empty when it was one each."""
    dense: Answers | None = None
    """The answers of the same node in the dense pipeline. None: this is the dense pipeline."""


AnswersByNode = Mapping[str, Answers]
"""The answers of a pipeline, by node."""


def count_right(right: np.ndarray | Sequence[bool]) -> PerSampleScores:
    """Return the scores of answers that are right or wrong."""
    return PerSampleScores(numerators=tuple(np.asarray(right, dtype=float).tolist()))


def answer_pairs(
    pipeline: Pipeline,
    pairs: Pairs,
    *,
    unjoined_encoders: Sequence[str] = (),
    progress: StageProgress = ignore_progress,
) -> dict[str, Answers]:
    """Send every input through a pipeline, one request each, and embed the references with its own
    encoder.

    Args:
        pipeline: A bundle.
        pairs: The inputs and their texts.
        unjoined_encoders: Encoders whose embeddings no join compares; these are kept.
        progress: Receives how many inputs are answered.

    Returns:
        The answers of every node that a metric may judge.
    """
    kinds = {
        name: get_kind(node["kind"]) for name, node in pipeline.manifest["graph"]["nodes"].items()
    }
    writers = [name for name, kind in kinds.items() if kind.writes_text]
    joins = [name for name, kind in kinds.items() if kind.joins]
    comparing_joins = [name for name, kind in kinds.items() if kind.compared_ports]
    texts: dict[str, list[str]] = {name: [] for name in (*writers, *joins)}
    endings: dict[str, list[str]] = {name: [] for name in writers}
    queries: dict[str, list[np.ndarray]] = {name: [] for name in comparing_joins}
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in unjoined_encoders}
    perceiving_nodes = [name for name, kind in kinds.items() if kind.perceives]
    windows: list[int] = []
    answering_nodes = [name for name in texts if kinds[name].answer_port]
    for i, value in enumerate(pairs.inputs):
        outputs = pipeline.run(**make_request(pipeline.inputs, value, text=pairs.texts[i]))
        for name in answering_nodes:
            texts[name].append(outputs[name][kinds[name].answer_port])
        for name in writers:
            endings[name].append(outputs[name][kinds[name].ending_output][0])
        for name in comparing_joins:
            query_port = kinds[name].compared_ports[0]
            query_node, port = parse_reference(pipeline.wiring[name][query_port])
            queries[name].append(outputs[query_node][port][0])
        windows.append(
            max(
                (len(outputs[name][kinds[name].embedding_output]) for name in perceiving_nodes),
                default=1,
            )
        )
        for name in unjoined_encoders:
            embedding = outputs[name][kinds[name].embedding_output]
            vectors[name].append(_average_directions(embedding))
        if i % PROGRESS_EVERY == 0:
            progress(f"{i} of {len(pairs)} inputs", i / len(pairs))
    answers: dict[str, Answers] = {}
    for name in (*writers, *joins, *unjoined_encoders):
        compared: dict[str, np.ndarray] = {}
        if name in queries:
            compared["queries"] = np.stack(queries[name])
            compared["keys"] = _embed_references(pipeline, name, pairs=pairs)
            if name not in answering_nodes:
                texts[name] = _find_nearest_texts(pairs.texts, **compared)
        answers[name] = Answers(
            references=pairs.texts,
            texts=tuple(texts.get(name, ())),
            endings=tuple(endings.get(name, ())),
            queries=compared.get("queries"),
            keys=compared.get("keys"),
            vectors=np.stack(vectors[name]) if name in vectors else None,
            windows=tuple(windows) if max(windows, default=1) > 1 else (),
        )
    return answers


def _average_directions(embedding_KD: np.ndarray) -> np.ndarray:
    """Return the mean of the embeddings of k windows, with length 1 [d]."""
    mean_D: np.ndarray = embedding_KD.mean(0)
    direction_D: np.ndarray = mean_D / max(float(np.linalg.norm(mean_D)), 1e-9)
    return direction_D


def _find_nearest_texts(
    references: Sequence[str], *, queries: np.ndarray, keys: np.ndarray
) -> list[str]:
    """Return for every query the reference text whose embedding is nearest.

    It is the answer of a join that only compares.

    Args:
        references: Texts by key.
        queries: Embeddings of the inputs [n, d].
        keys: Embeddings of the texts [n, d].
    """
    return [references[i] for i in (queries @ keys.T).argmax(1)]


def _embed_references(pipeline: Pipeline, join: str, *, pairs: Pairs) -> np.ndarray:
    """Embed the reference texts with the encoder behind the second compared port of a join [n,
    d]."""
    kind = get_kind(pipeline.manifest["graph"]["nodes"][join]["kind"])
    encoder_name, port = parse_reference(pipeline.wiring[join][kind.compared_ports[1]])
    encoder = pipeline.nodes[encoder_name]
    parts: list[np.ndarray] = []
    for start in range(0, len(pairs), ENCODE_BATCH):
        texts = list(pairs.texts[start : start + ENCODE_BATCH])
        parts.append(encoder(texts)[port])
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What all metrics of a spec say of the answers of a pipeline."""

    scores: dict[str, PerSampleScores]
    """Scores by name of the figure: `<figure>` when one node has it, `<figure>.<node>` when several
    do."""
    failures: dict[str, str]
    """Why a metric has no figure, by `<metric>.<node>`."""


def score_answers(
    answers: AnswersByNode, *, spec: Spec, dense: AnswersByNode | None = None
) -> Scoring:
    """Score the answers of a pipeline by every metric of a spec.

    A metric that raises, or returns what is no score, costs its own figure and nothing else. The
    pipeline is trained and has answered by now.

    Args:
        answers: The answers by node.
        spec: The spec; each of its metrics judges the nodes that have what it needs, or the one
            that it names.
        dense: The answers of the dense pipeline; None when these are the dense ones.
    """
    by_node: dict[str, dict[str, PerSampleScores | None]] = {}
    failures: dict[str, str] = {}
    for metric in spec.metrics:
        nodes = find_judged_nodes(spec, METRICS.get_fact(metric.kind, "needs"))
        failed_nodes: list[str] = []
        names: dict[str, None] = {}
        for node in (metric.of,) if metric.of else nodes:
            judged_answers = answers[node]
            if dense is not None:
                judged_answers = replace(judged_answers, dense=dense[node])
            try:
                figures = _score_node(metric.kind, judged_answers)
            except Exception as error:
                failures[f"{metric.kind}.{node}"] = f"{type(error).__name__}: {error}"
                failed_nodes.append(node)
                continue
            names |= dict.fromkeys(figures)
            by_node.setdefault(node, {}).update(figures)
        for node in failed_nodes:
            # What other nodes are called must not depend on whether this one has a figure.
            by_node.setdefault(node, {}).update(dict.fromkeys(names))
    scores: dict[str, PerSampleScores] = {}
    for name, score in name_by_node(by_node).items():
        if score is not None:
            scores[name] = score
    return Scoring(scores=scores, failures=failures)


def _score_node(metric: str, judged_answers: Answers) -> dict[str, PerSampleScores]:
    """Score the answers of one node by one metric; what a plug-in returns is checked.

    Raises:
        Exception: The metric can't be imported, raises, or returns what is no score of every input.
    """
    figures: dict[str, PerSampleScores] = {}
    for name, scores in dict(METRICS.get(metric)(judged_answers)).items():
        if not isinstance(scores, PerSampleScores):
            raise TypeError(f"{name}: expected PerSampleScores, got {type(scores).__name__}")
        numerators = tuple(float(value) for value in scores.numerators)
        denominators = tuple(float(value) for value in scores.denominators)
        for values in (numerators, denominators or numerators):
            if len(values) != len(judged_answers.references):
                raise ValueError(
                    f"{name}: {len(values)} scores of {len(judged_answers.references)} inputs"
                )
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name}: a score is not finite")
        if not denominators and not all(0 <= value <= 1 for value in numerators):
            raise ValueError(f"{name}: a score without a denominator lies outside 0 .. 1")
        figures[str(name)] = replace(scores, numerators=numerators, denominators=denominators)
    return figures
