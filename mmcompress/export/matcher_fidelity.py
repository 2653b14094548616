"""Fidelity of fusion encoders: what a picture and a text together make."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np

from mmcompress.export.differences import NodeDifferences, compare_embeddings, compare_prepared
from mmcompress.export.fidelity import ComparedNode, FidelityCheck
from mmcompress.models.reference.base import LibraryMatcher
from mmcompress.runtime.text import TextReader, Values


class DeployedMatcher(Protocol):
    """A fusion encoder of a bundle."""

    reader: TextReader
    """Makes token ids of texts."""

    def __call__(self, text: str, context: np.ndarray) -> Values:
        """Read a text together with the vectors of a picture."""
        ...


def compare_matcher(
    node_name: str, check: FidelityCheck, *, source: ComparedNode | None
) -> ComparedNode:
    """Compare what a fusion encoder makes of pictures and their texts with its library.

    Args:
        node_name: The fusion encoder.
        check: The bundle and its data.
        source: The encoder whose tokens it reads, as it was compared.
    """
    uncompared = ComparedNode(name=node_name)
    if not source:
        check.leave_out(node_name, "it reads no tokens")
        return uncompared
    if check.spec.nodes[node_name].source != check.spec.nodes[source.name].source:
        check.leave_out(node_name, f"it and {source.name} come from two checkpoints")
        return uncompared
    matcher = check.open_or_tell(node_name)
    if not isinstance(matcher, LibraryMatcher):
        return uncompared
    differences = NodeDifferences()
    deployed = cast(DeployedMatcher, check.pipeline.nodes[node_name])
    token_port = check.find_token_port(node_name)
    pictures = [raw for raw in source.raw_inputs if not raw.is_odd]
    for raw, text in zip(pictures, check.pairs.texts, strict=True):
        expected = matcher.match(raw.references[0], text)
        tokens = check.pipeline.nodes[source.name](raw.value)[token_port]
        actual = deployed(text, tokens)
        ids = deployed.reader.read([text]).ids[0]
        differences.prepared.add(compare_prepared(ids, expected.prepared), raw.name)
        differences.embedding.add(
            compare_embeddings(actual["embedding"][0], expected.embedding), raw.name
        )
        probability = 1 / (1 + np.exp(-float(actual["scores"][0])))
        differences.match.add(abs(probability - expected.match), raw.name)
    return ComparedNode(name=node_name, proofs=tuple(differences.to_proofs(node_name)))
