"""The proof of fidelity: a dense bundle answers raw inputs as the library of each model does.

The other proofs start behind preprocessing and end before pooling and the end of a text. A fault
there stands in the dense pipeline as in the compressed one, so that "retained 100 %" holds for the
wrong thing. Here a raw input goes two ways: through the library's own processor, tokenizer, model
and `generate` (`mmcompress.models.reference`), and through the bundle.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.data.base import Dataset
from mmcompress.export.odd_inputs import RawInput, list_pictures, list_sounds, list_texts
from mmcompress.export.proofs import GENERATION_BOUND, make_proof
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import find_token_source
from mmcompress.models.reference.base import LibraryReference, ReferenceRequest, WritingLimits
from mmcompress.models.sources import fetch_folder, locate_node_source
from mmcompress.registry import LIBRARY_REFERENCES
from mmcompress.results.records import Proof
from mmcompress.runtime.graph import Pipeline, load_bundle
from mmcompress.spec.schema import Spec

FIDELITY_INPUTS = 16
"""Validation inputs that are sent both ways, beside the odd ones."""

MAX_WRITTEN_INPUTS = 6
"""Of these, inputs at most that texts are written for: the library's own loop is slow."""

PREPROCESSING_BOUND = 0.03
"""Largest difference of a standardized pixel, or of a feature: two ways of resizing round
differently."""

EMBEDDING_BOUND = 1e-4
"""Largest 1 - cosine of an embedding to the library's."""


@dataclass(kw_only=True)
class _Worst:
    """The largest difference of one comparison so far."""

    difference: float = 0.0
    """The difference."""
    name: str = ""
    """The input that it was found at."""
    count: int = 0
    """Inputs that were compared."""

    def add(self, difference: float, name: str) -> None:
        """Add the difference of one input; what can't be compared differs by infinity."""
        self.count += 1
        value = difference if np.isfinite(difference) else float("inf")
        if value > self.difference or not self.name:
            self.difference = value
            self.name = name


@dataclass(kw_only=True)
class _NodeComparison:
    """The comparisons of one node."""

    prepared: _Worst = field(default_factory=_Worst)
    """What the model is given."""
    embedding: _Worst = field(default_factory=_Worst)
    """Its embedding."""

    def to_proofs(self, node_name: str) -> list[Proof]:
        """Return the proofs of what was compared."""
        rows = {
            "preprocessing": (self.prepared, PREPROCESSING_BOUND),
            "embedding": (self.embedding, EMBEDDING_BOUND),
        }
        proofs = []
        for name, (worst, bound) in rows.items():
            if worst.count:
                proofs.append(
                    make_proof(
                        f"dense == library: {name}",
                        node_name,
                        difference=worst.difference,
                        bound=bound,
                        detail=f"({worst.count} raw inputs, most at {worst.name})",
                    )
                )
        return proofs


def prove_fidelity(spec: Spec, *, bundle: Path, data: Dataset) -> list[Proof]:
    """Compare the answers of a dense bundle to raw inputs with those of the models' libraries.

    Args:
        spec: The pipeline.
        bundle: Its dense bundle.
        data: Its validation split gives the raw inputs; odd ones are made of them.

    Returns:
        Proofs `dense == library: ...` for every node whose library is known; failed ones included.
        A model of the user's own module has no library to compare with.
    """
    pipeline = load_bundle(bundle)
    pairs = data.load("val", FIDELITY_INPUTS)
    proofs: list[Proof] = []
    with tempfile.TemporaryDirectory() as scratch:
        for node_name, node in spec.model_nodes().items():
            reference = open_reference(spec, node_name)
            if reference is None:
                continue
            [input_type] = next(iter(get_kind(node.kind).inputs.values())).types[:1]
            raw_inputs = _list_raw_inputs(
                input_type, pipeline.nodes[node_name], pairs=pairs, folder=Path(scratch)
            )
            comparison = _compare_node(pipeline.nodes[node_name], reference, raw_inputs=raw_inputs)
            proofs += comparison.to_proofs(node_name)
            proofs += _prove_written_texts(
                spec, pipeline, source=node_name, reference=reference, raw_inputs=raw_inputs
            )
    return proofs


def open_reference(spec: Spec, node_name: str) -> LibraryReference | None:
    """Return the library's own model of a node, or None where there is no such library."""
    node = spec.nodes[node_name]
    location = locate_node_source(node)
    key = f"{location.library}/{node.kind}"
    if LIBRARY_REFERENCES.problem(key):
        return None
    folder = fetch_folder(location)
    name = str(folder) if folder else location.name
    if folder and location.library == "open_clip":
        name = f"local-dir:{folder}"
    request = ReferenceRequest(
        location=name, pretrained=location.pretrained, max_tokens=node.max_tokens
    )
    reference: LibraryReference = LIBRARY_REFERENCES.get(key)(request)
    return reference


def _list_raw_inputs(input_type: str, deployed: Any, *, pairs: Any, folder: Path) -> list[RawInput]:
    """Return the raw inputs of a type: ordinary ones from the data, and odd ones."""
    if input_type == "image":
        return list_pictures(list(pairs.inputs), folder)
    if input_type == "audio":
        return list_sounds(list(pairs.inputs), float(deployed.options["seconds"]))
    return list_texts(pairs.texts)


def _compare_node(
    deployed: Any, reference: LibraryReference, *, raw_inputs: Sequence[RawInput]
) -> _NodeComparison:
    """Send raw inputs both ways through one node."""
    comparison = _NodeComparison()
    for raw in raw_inputs:
        try:
            answer = reference.answer(raw.reference)
        except Exception:  # libraries raise what they like
            if not raw.is_odd:
                raise
            # What the library refuses has no answer to compare with.
            continue
        prepared = deployed.prepare(raw.value)
        comparison.prepared.add(_compare_prepared(prepared[0], answer.prepared), raw.name)
        if answer.embedding is not None:
            embedding = np.asarray(deployed(raw.value)["embedding"][0], np.float64)
            length = max(float(np.linalg.norm(embedding)), 1e-12)
            if embedding.shape != answer.embedding.shape:
                comparison.embedding.add(float("inf"), raw.name)
            else:
                cosine = float(embedding @ answer.embedding) / length
                comparison.embedding.add(max(1.0 - cosine, 0.0), raw.name)
    return comparison


def _compare_prepared(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of what two sides give a model; token ids must be equal."""
    if np.issubdtype(expected.dtype, np.integer):
        return _compare_ids(actual.tolist(), expected.tolist())
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max())


def _compare_ids(actual: list[int], expected: list[int]) -> float:
    """Return 0 for equal token ids, apart from padding behind them, and infinity for others."""
    common = min(len(actual), len(expected))
    rest = [*actual[common:], *expected[common:]]
    if actual[:common] == expected[:common] and len(set(rest)) <= 1:
        return 0.0
    return float("inf")


def _prove_written_texts(
    spec: Spec,
    pipeline: Pipeline,
    *,
    source: str,
    reference: LibraryReference,
    raw_inputs: Sequence[RawInput],
) -> list[Proof]:
    """Compare what generators of the same checkpoint write of raw inputs, token for token."""
    proofs: list[Proof] = []
    for node_name, node in spec.model_nodes().items():
        kind = get_kind(node.kind)
        if not kind.writes_text or find_token_source(spec, node_name) != source:
            continue
        if node.source != spec.nodes[source].source:
            # Generator and encoder come from two checkpoints: no library has the two together.
            continue
        worst = _Worst()
        writer: Any = pipeline.nodes[node_name]
        different = 0
        for raw in raw_inputs[:MAX_WRITTEN_INPUTS]:
            tokens = pipeline.nodes[source](raw.value)["tokens"]
            if not len(tokens):
                # of silence the bundle writes nothing on purpose
                continue
            expected = reference.write(raw.reference, _describe_limits(writer))
            if expected is None:
                return []
            writer(tokens)
            actual = list(writer.traces[0].sequences[0][1])
            is_equal = _strip_specials(writer, actual) == _strip_specials(writer, expected)
            different += not is_equal
            worst.add(float(not is_equal), raw.name)
        detail = f"({worst.count} raw inputs{f', first at {worst.name}' if different else ''})"
        proofs.append(
            make_proof(
                "dense == library: texts",
                node_name,
                difference=different / max(worst.count, 1),
                bound=GENERATION_BOUND,
                detail=detail,
            )
        )
    return proofs


def _describe_limits(writer: Any) -> WritingLimits:
    """Return what the spec chooses of a generator."""
    generation = writer.generation
    return WritingLimits(
        beams=generation.beams,
        max_tokens=generation.max_tokens,
        lead_tokens=max(len(generation.prompt), 1),
    )


def _strip_specials(writer: Any, ids: Sequence[int]) -> str:
    """Return what a reader sees of token ids."""
    text: str = writer.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
    return text.strip()
