"""Fidelity of encoders: the raw input, what the model is given of it, and the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np

from mmcompress.errors import DataError, MissingPackage, ModelError
from mmcompress.export.differences import (
    NodeDifferences,
    compare_embeddings,
    compare_windows,
    summarize_error,
)
from mmcompress.export.fidelity import ComparedNode, FidelityCheck
from mmcompress.export.odd_inputs import RawInput
from mmcompress.graph.ports import get_kind
from mmcompress.models.reference.base import LibraryAnswer, LibraryReference
from mmcompress.runtime.text import Values


class DeployedEncoder(Protocol):
    """An encoder of a bundle, as far as it is needed here."""

    def __call__(self, value: object, /) -> Values:
        """Encode one raw input."""
        ...

    def prepare(self, value: object, /) -> np.ndarray:
        """Return what the model is given of one raw input."""
        ...


def compare_encoder(
    node_name: str, check: FidelityCheck, *, source: ComparedNode | None
) -> ComparedNode:
    """Compare an encoder of raw inputs with its library.

    Args:
        node_name: The encoder.
        check: The bundle and its data.
        source: The node whose tokens it reads; an encoder of raw inputs reads none.

    Raises:
        ModelError: The library refuses an ordinary input.
    """
    reference = check.open_or_tell(node_name)
    if not isinstance(reference, LibraryReference):
        return ComparedNode(name=node_name)
    raw_inputs = check.list_raw_inputs(node_name)
    differences = _compare_node(
        cast(DeployedEncoder, check.pipeline.nodes[node_name]),
        reference,
        node_name=node_name,
        raw_inputs=raw_inputs,
        embedding_port=get_kind(check.spec.nodes[node_name].kind).embedding_output,
    )
    return ComparedNode(
        name=node_name,
        reference=reference,
        raw_inputs=tuple(raw_inputs),
        proofs=tuple(differences.to_proofs(node_name)),
    )


def _compare_node(
    deployed: DeployedEncoder,
    reference: LibraryReference,
    *,
    node_name: str,
    raw_inputs: Sequence[RawInput],
    embedding_port: str,
) -> NodeDifferences:
    """Send raw inputs both ways through one node.

    Raises:
        ModelError: The library refuses an ordinary input.
    """
    differences = NodeDifferences()
    departures: dict[str, list[str]] = {}
    for raw in raw_inputs:
        try:
            answers = [reference.answer(one) for one in raw.references]
        except Exception as error:  # libraries raise what they like
            if not raw.is_odd:
                raise ModelError(
                    f"{node_name}: its library can't read {raw.name} of the data: "
                    f"{summarize_error(error)}"
                ) from error
            differences.notes.append(f"its library refuses {raw.name} ({summarize_error(error)})")
            continue
        if raw.departure:
            departures.setdefault(raw.departure, []).append(raw.name)
        _compare_input(
            differences, raw, deployed=deployed, answers=answers, embedding_port=embedding_port
        )
    if not differences.embedding.count:
        differences.notes.append("its library has no embedding of its own")
    for departure, names in departures.items():
        differences.notes.append(f"{departure}, on purpose: {', '.join(names)}")
    return differences


def _compare_input(
    differences: NodeDifferences,
    raw: RawInput,
    *,
    deployed: DeployedEncoder,
    answers: Sequence[LibraryAnswer],
    embedding_port: str,
) -> None:
    """Add the differences of one raw input, in place."""
    try:
        prepared = deployed.prepare(raw.value)
    except MissingPackage as error:
        differences.notes.append(f"without {raw.name}: {summarize_error(error)}")
        return
    except DataError as error:
        if not raw.is_odd:
            raise
        differences.prepared.add(float("inf"), f"{raw.name}, refused: {summarize_error(error)}")
        return
    expected = [answer.prepared for answer in answers]
    differences.prepared.add(compare_windows(prepared, expected), raw.name)
    if raw.decoded is not None:
        decoded = deployed.prepare(raw.decoded)
        name = f"{raw.name} as the data decode it"
        differences.prepared.add(compare_windows(decoded, expected), name)
    own_embeddings = [answer.embedding for answer in answers if answer.embedding is not None]
    if own_embeddings and embedding_port:
        embeddings = deployed(raw.value)[embedding_port]
        for actual, own in zip(embeddings, own_embeddings, strict=False):
            differences.embedding.add(compare_embeddings(actual, own), raw.name)
