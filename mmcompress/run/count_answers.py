"""What the answers of a pipeline look like, whatever a metric says of them. No torch.

A generator that writes "" of everything agrees with itself on all inputs. "Retained 100 %" then
says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mmcompress.graph.judged_nodes import COMPARED_EMBEDDINGS, find_judged_nodes
from mmcompress.graph.ports import get_kind
from mmcompress.registry import METRICS
from mmcompress.results.records import AnswerCounts
from mmcompress.spec.schema import Spec

MIN_EQUAL_COSINE = 0.9999
"""Cosine to the mean direction from which embeddings count as equal. Embeddings of different inputs
lie further apart, even those of a poor model."""


def find_judged_answers(spec: Spec) -> frozenset[str]:
    """Return the nodes whose answers a metric of the spec judges.

    A join that compares two embeddings answers with the nearest text. Where it answers with another
    one, a metric of its embeddings does not judge that.
    """
    nodes: set[str] = set()
    for metric in spec.metrics:
        need = METRICS.get_fact(metric.kind, "needs")
        for node in (metric.of,) if metric.of else find_judged_nodes(spec, need):
            has_other_answer = bool(get_kind(spec.nodes[node].kind).answer_port)
            if need == COMPARED_EMBEDDINGS and has_other_answer:
                continue
            nodes.add(node)
    return frozenset(nodes)


def count_answers(
    spec: Spec,
    texts_by_node: Mapping[str, Sequence[str]],
    *,
    vectors_by_node: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> dict[str, AnswerCounts]:
    """Count the empty and the equal answers of every node.

    Args:
        spec: The pipeline.
        texts_by_node: The texts that each node writes or finds for the inputs of a split.
        vectors_by_node: Embeddings of length 1 [n, d] of encoders that no join compares.
    """
    judged = find_judged_answers(spec)
    counts: dict[str, AnswerCounts] = {}
    for node, vectors in (vectors_by_node or {}).items():
        counts[node] = AnswerCounts(
            inputs=len(vectors),
            empty=0,
            alike=_count_equal_vectors(np.asarray(vectors)),
            example="",
            judged=node in judged,
        )
    for node, texts in texts_by_node.items():
        frequencies = Counter(text for text in texts if text.strip())
        most_frequent = frequencies.most_common(1)
        alike_count = 0
        example = ""
        # a text that stands alone is equal to no other
        if most_frequent and most_frequent[0][1] > 1:
            example, alike_count = most_frequent[0]
        if spec.report.samples == "none":
            # What is passed on then holds no text of the user's data.
            example = ""
        counts[node] = AnswerCounts(
            inputs=len(texts),
            empty=len(texts) - frequencies.total(),
            alike=alike_count,
            example=example,
            judged=node in judged,
        )
    return counts


def _count_equal_vectors(vectors_ND: np.ndarray) -> int:
    """Count the embeddings that lie in one direction; 0 where each has its own."""
    mean_D = vectors_ND.mean(0)
    length = float(np.linalg.norm(mean_D))
    if len(vectors_ND) < 2 or length == 0:
        return 0
    alike_count = int(np.sum(vectors_ND @ (mean_D / length) >= MIN_EQUAL_COSINE))
    return alike_count if alike_count > 1 else 0
