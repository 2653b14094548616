"""What the dense pipeline's answers look like, whatever a metric says of them. No torch.

A generator that writes "" of everything agrees with itself on all inputs. "Retained 100 %" then
says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from mmcompress.graph.judged_nodes import ANSWERS, FINAL_TEXTS, WRITTEN_TEXTS, find_judged_nodes
from mmcompress.registry import METRICS
from mmcompress.results.records import AnswerCounts
from mmcompress.spec.schema import Spec

TEXT_NEEDS = (FINAL_TEXTS, WRITTEN_TEXTS, ANSWERS)
"""What a metric needs that looks at texts."""


def find_text_judged_nodes(spec: Spec) -> frozenset[str]:
    """Return the nodes whose texts a metric of the spec judges."""
    nodes: set[str] = set()
    for metric in spec.metrics:
        need = METRICS.get_fact(metric.kind, "needs")
        if need in TEXT_NEEDS:
            nodes.update((metric.of,) if metric.of else find_judged_nodes(spec, need))
    return frozenset(nodes)


def count_answers(
    spec: Spec, texts_by_node: Mapping[str, Sequence[str]]
) -> dict[str, AnswerCounts]:
    """Count the empty and the equal texts of every node that writes or finds any.

    Args:
        spec: The pipeline.
        texts_by_node: The texts of a split, by node.
    """
    judged = find_text_judged_nodes(spec)
    counts: dict[str, AnswerCounts] = {}
    for node, texts in texts_by_node.items():
        frequencies = Counter(text for text in texts if text.strip())
        most_frequent = frequencies.most_common(1)
        alike_count = 0
        example = ""
        # a text that stands alone is equal to no other
        if most_frequent and most_frequent[0][1] > 1:
            example, alike_count = most_frequent[0]
        counts[node] = AnswerCounts(
            inputs=len(texts),
            empty=len(texts) - frequencies.total(),
            alike=alike_count,
            example=example,
            judged=node in judged,
        )
    return counts
