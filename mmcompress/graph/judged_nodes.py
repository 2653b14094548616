"""Which nodes of a pipeline a metric judges: a metric says what it needs, the graph says which
nodes have it."""

from __future__ import annotations

from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import find_unjoined_encoders, parse_reference
from mmcompress.spec.schema import Spec

COMPARED_EMBEDDINGS = "compared_embeddings"
"""Joins that compare the embeddings of two models."""

WRITTEN_TEXTS = "written_texts"
"""Generators."""

FINAL_TEXTS = "final_texts"
"""For each generator, the join that chooses among its texts, or the generator itself when none
does."""

ANSWERS = "answers"
"""All joins, or the generators when there is no join."""

UNJOINED_EMBEDDINGS = "unjoined_embeddings"
"""Encoders whose embedding no join compares."""


def find_judged_nodes(spec: Spec, requirement: str) -> tuple[str, ...]:
    """Return the nodes that have what a metric needs.

    Args:
        spec: The pipeline.
        requirement: One of the constants of this file.

    Returns:
        Names of nodes, in the order of the spec; empty when there is nothing to judge.

    Raises:
        ValueError: A metric needs something that no node has a name for.
    """
    kinds = {name: get_kind(node.kind) for name, node in spec.nodes.items()}
    writers = [name for name, kind in kinds.items() if kind.writes_text]
    joins = [name for name, kind in kinds.items() if kind.joins]
    if requirement == COMPARED_EMBEDDINGS:
        return tuple(name for name in joins if kinds[name].compared_ports)
    if requirement == WRITTEN_TEXTS:
        return tuple(writers)
    if requirement == FINAL_TEXTS:
        return tuple(_find_choosing_join(spec, writer) or writer for writer in writers)
    if requirement == ANSWERS:
        return tuple(joins or writers)
    if requirement == UNJOINED_EMBEDDINGS:
        return find_unjoined_encoders(spec)
    raise ValueError(f"a metric needs '{requirement}', which is nothing that a node has")


def _find_choosing_join(spec: Spec, writer: str) -> str:
    """Return the join that chooses among the texts of a generator, or an empty name."""
    for name, node in spec.nodes.items():
        kind = get_kind(node.kind)
        references = [node.inputs.get(port, "") for port in kind.text_ports]
        text_sources = [parse_reference(reference).node for reference in references]
        if kind.compared_ports and writer in text_sources:
            return name
    return ""
