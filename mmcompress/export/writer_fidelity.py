"""Fidelity of generators: what a bundle writes of raw inputs, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from mmcompress.errors import DataError, MissingPackage
from mmcompress.export.differences import summarize_error
from mmcompress.export.fidelity import ComparedNode, FidelityCheck
from mmcompress.export.odd_inputs import RawInput
from mmcompress.export.written_texts import (
    DeployedWriter,
    WritingInput,
    compare_texts,
    make_request,
    make_text_proof,
)
from mmcompress.models.reference.base import LibraryReference, LibraryWriter

MAX_WRITTEN_INPUTS = 4
"""Of the ordinary inputs, and of the odd ones, those at most that texts are written for: the
library's own loop is slow."""


def compare_writer(
    node_name: str, check: FidelityCheck, *, source: ComparedNode | None
) -> ComparedNode:
    """Compare what a generator writes of raw inputs with what its library writes.

    Args:
        node_name: The generator.
        check: The bundle and its data.
        source: The encoder whose tokens it reads, as it was compared.
    """
    uncompared = ComparedNode(name=node_name)
    encoder = source.reference if source else None
    if not source or not isinstance(encoder, LibraryReference):
        check.leave_out(node_name, "it reads a node whose library gives no vectors")
        return uncompared
    node = check.spec.nodes[node_name]
    is_one_checkpoint = node.source == check.spec.nodes[source.name].source
    # A generator of another checkpoint is given what the encoder's library makes.
    writer: object = encoder if is_one_checkpoint else check.open_or_tell(node_name)
    if not isinstance(writer, LibraryWriter):
        if writer is not None:
            check.leave_out(node_name, f"the library of {source.name} writes no text")
        return uncompared
    notes: list[str] = []
    inputs: list[WritingInput] = []
    for raw in choose_written_inputs(source.raw_inputs):
        try:
            outputs = check.pipeline.nodes[source.name](raw.value)
        except (DataError, MissingPackage) as error:
            notes.append(f"without {raw.name}: {summarize_error(error)}")
            continue
        tokens = outputs[check.find_token_port(node_name)]
        references = tuple(one for one in raw.references if not check.is_empty(source.name, one))
        if not len(tokens) and not references:
            notes.append(f"of {raw.name} nothing is written, on purpose")
            continue
        if not is_one_checkpoint:
            references = tuple(encoder.compute_tokens(one) for one in references)
            if any(vectors is None for vectors in references):
                check.leave_out(node_name, f"the library of {source.name} gives no vectors")
                return uncompared
        inputs.append(WritingInput(name=raw.name, tokens=tokens, references=references))
    deployed = cast(DeployedWriter, check.pipeline.nodes[node_name])
    request = make_request(node, deployed.generation)
    written = compare_texts(deployed, writer, request=request, inputs=inputs)
    if written is None:
        check.leave_out(node_name, "its library writes no text with such options")
        return uncompared
    return ComparedNode(name=node_name, proofs=(make_text_proof(node_name, written, notes=notes),))


def choose_written_inputs(raw_inputs: Sequence[RawInput]) -> list[RawInput]:
    """Return the first ordinary inputs and the first odd ones: texts are written of these."""
    ordinary = [raw for raw in raw_inputs if not raw.is_odd]
    odd = [raw for raw in raw_inputs if raw.is_odd]
    return [*ordinary[:MAX_WRITTEN_INPUTS], *odd[:MAX_WRITTEN_INPUTS]]
