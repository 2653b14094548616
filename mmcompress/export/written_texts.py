"""Comparison of the texts of a deployed generator with those of its library, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from mmcompress.export.proofs import GENERATION_BOUND, make_proof
from mmcompress.models.reference.base import LibraryWriter, WritingRequest
from mmcompress.results.records import Proof
from mmcompress.runtime.beam_search import Generation
from mmcompress.runtime.replay import GenerationTrace
from mmcompress.runtime.text import Values
from mmcompress.spec.schema import Node

TIE_LOGITS = 1e-4
"""Difference of two logits of the library below which rounding decides which token is written."""

SHOWN_TOKENS = 6
"""Tokens of each text that a proof shows, from the first one that differs."""


class DeployedWriter(Protocol):
    """A generator of a bundle, as far as it is needed here."""

    generation: Generation
    """How it writes."""
    traces: list[GenerationTrace]
    """What it wrote of each window in its last call."""

    def __call__(self, context: np.ndarray) -> Values:
        """Write texts for the vectors of an encoder."""
        ...


@dataclass(frozen=True, kw_only=True)
class WritingInput:
    """One raw input of a generator."""

    name: str
    """What it is, for a person."""
    tokens: np.ndarray
    """What the deployed encoder gives the deployed generator, [k, n, w]."""
    references: tuple[object, ...]
    """What the library's writer is given for each of the k windows."""


@dataclass(kw_only=True)
class WrittenTexts:
    """What a comparison found so far."""

    count: int = 0
    """Inputs that were compared."""
    texts: set[tuple[int, ...]] = field(default_factory=set)
    """Different texts that the library wrote: one text of all inputs proves little."""
    different: list[str] = field(default_factory=list)
    """Inputs with other texts, and the first difference of each."""
    ties: list[str] = field(default_factory=list)
    """Inputs where rounding decided, and between which tokens."""


def make_request(node: Node, generation: Generation) -> WritingRequest:
    """Return what a node chooses of the writing of its texts."""
    return WritingRequest(
        beams=generation.beams,
        max_tokens=node.get_option("max_tokens", 0),
        start=generation.prompt or (generation.bos,),
        prompt=node.get_option("prompt", ""),
        language=node.get_option("language", ""),
        task=node.get_option("task", ""),
    )


def compare_texts(
    deployed: DeployedWriter,
    writer: LibraryWriter,
    *,
    request: WritingRequest,
    inputs: Sequence[WritingInput],
) -> WrittenTexts | None:
    """Compare what a bundle and a library write of the same raw inputs.

    The best texts are compared, from the first token that they start from to their end. The guard
    against endless repetition is left out: it is the bundle's own.

    Args:
        deployed: The generator of the bundle.
        writer: The library's.
        request: What the spec chooses.
        inputs: The raw inputs.

    Returns:
        What was found; None where the library does not write in such a way.
    """
    comparison = WrittenTexts()
    guarded_settings = deployed.generation
    deployed.generation = replace(guarded_settings, guard=False)
    try:
        for writing_input in inputs:
            is_written = _compare_input(
                comparison, writing_input, deployed=deployed, writer=writer, request=request
            )
            if not is_written:
                return None
    finally:
        deployed.generation = guarded_settings
    return comparison


def _compare_input(
    comparison: WrittenTexts,
    writing_input: WritingInput,
    *,
    deployed: DeployedWriter,
    writer: LibraryWriter,
    request: WritingRequest,
) -> bool:
    """Add one input to what was found, in place, and return whether the library wrote of it."""
    comparison.count += 1
    if len(writing_input.tokens) != len(writing_input.references):
        comparison.different.append(
            f"{writing_input.name}: {len(writing_input.tokens)} windows deployed, "
            f"{len(writing_input.references)} expected"
        )
        return True
    deployed(writing_input.tokens)
    for raw, trace in zip(writing_input.references, deployed.traces, strict=True):
        written_ids = writer.write(raw, request)
        if written_ids is None:
            return False
        actual = list(trace.sequences[0][1])
        expected = _cut_behind_end(written_ids, deployed.generation)
        comparison.texts.add(tuple(expected))
        place = _find_difference(actual, expected)
        if place is None:
            continue
        tie = _describe_tie(actual, expected, place=place, writer=writer, raw=raw, request=request)
        if tie:
            comparison.ties.append(f"{writing_input.name}: {tie}")
            continue
        shown_tokens = slice(place, place + SHOWN_TOKENS)
        comparison.different.append(
            f"{writing_input.name}: from token {place + 1} on {actual[shown_tokens]} deployed, "
            f"{expected[shown_tokens]} by the library"
        )
        return True
    return True


def _cut_behind_end(ids: Sequence[int], generation: Generation) -> list[int]:
    """Return token ids through the first end token. The start may hold one, too."""
    for place in range(len(generation.start), len(ids)):
        if ids[place] in generation.ends:
            return list(ids[: place + 1])
    return list(ids)


def _find_difference(actual: Sequence[int], expected: Sequence[int]) -> int | None:
    """Return the first place where two texts differ; None for equal ones."""
    for place in range(max(len(actual), len(expected))):
        if actual[place : place + 1] != expected[place : place + 1]:
            return place
    return None


def _describe_tie(
    actual: Sequence[int],
    expected: Sequence[int],
    *,
    place: int,
    writer: LibraryWriter,
    raw: object,
    request: WritingRequest,
) -> str:
    """Return between which tokens rounding decided; empty where the texts differ for a reason."""
    is_inside = place < min(len(actual), len(expected))
    if not is_inside or place < len(request.start):
        return ""
    logits = writer.compute_logits(raw, ids=expected[:place], request=request)
    logit_difference = abs(float(logits[expected[place]]) - float(logits[actual[place]]))
    if logit_difference > TIE_LOGITS:
        return ""
    return f"tokens {expected[place]} and {actual[place]} have logits {logit_difference:.1e} apart"


def make_text_proof(node_name: str, comparison: WrittenTexts, *, notes: Sequence[str]) -> Proof:
    """Return the proof of what was compared; ties don't fail it.

    Args:
        node_name: The generator.
        comparison: What was compared.
        notes: What else a reader should know of it.
    """
    parts = [f"{comparison.count} raw inputs, {len(comparison.texts)} different texts", *notes]
    if comparison.ties:
        parts.append(f"ties: {'; '.join(comparison.ties)}")
    if comparison.different:
        parts.append(f"first difference: {comparison.different[0]}")
    return make_proof(
        "dense == library: texts",
        node_name,
        difference=len(comparison.different) / max(comparison.count, 1),
        bound=GENERATION_BOUND,
        detail=f"({'; '.join(parts)})",
    )
