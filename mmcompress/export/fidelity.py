"""The proof of fidelity: a dense bundle answers raw inputs as the library of each model does.

The other proofs start behind preprocessing and end before pooling and the end of a text. A fault
there stands in the dense pipeline as in the compressed one, so that "retained 100 %" holds for the
wrong thing. Here a raw input goes two ways: through the library's own processor, tokenizer, model
and `generate` (`mmcompress.models.reference`), and through the bundle.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from mmcompress.data.base import Dataset, Pairs
from mmcompress.errors import DataError, MissingPackage, ModelError
from mmcompress.export.odd_inputs import RawInput, list_pictures, list_sounds, list_texts
from mmcompress.export.proofs import make_proof
from mmcompress.export.written_texts import (
    DeployedWriter,
    WritingInput,
    compare_texts,
    make_request,
    make_text_proof,
)
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import find_token_source
from mmcompress.models.reference.base import (
    LibraryAnswer,
    LibraryMatcher,
    LibraryReference,
    LibraryWriter,
    ReferenceRequest,
)
from mmcompress.models.sources import fetch_folder, locate_node_source
from mmcompress.registry import LIBRARY_REFERENCES
from mmcompress.results.records import Proof
from mmcompress.runtime.audio import is_silent
from mmcompress.runtime.graph import Pipeline, load_bundle
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.runtime.text import TextReader, Values
from mmcompress.spec.schema import Spec

FIDELITY_INPUTS = 16
"""Validation inputs that are sent both ways, beside the odd ones."""

MAX_WRITTEN_INPUTS = 6
"""Of the ordinary inputs, and of the odd ones, those at most that texts are written for: the
library's own loop is slow."""

PREPROCESSING_BOUND = 0.03
"""Largest difference of a standardized pixel, or of a feature: two ways of resizing round
differently."""

EMBEDDING_BOUND = 1e-4
"""Largest 1 - cosine of an embedding to the library's."""

MATCH_BOUND = 0.01
"""Largest difference of the probability that a text describes a picture. A pixel that is rounded
otherwise moves it by less."""

SHOWN_ERROR_CHARACTERS = 60
"""Characters of a library's error that a proof shows."""


Reference = LibraryReference | LibraryWriter | LibraryMatcher
"""A library's own model of a node."""


class DeployedEncoder(Protocol):
    """An encoder of a bundle, as far as it is needed here."""

    def __call__(self, value: object, /) -> Values:
        """Encode one raw input."""
        ...

    def prepare(self, value: object, /) -> np.ndarray:
        """Return what the model is given of one raw input."""
        ...


class DeployedHearing(Protocol):
    """An encoder of sounds."""

    options: Mapping[str, float]
    """`seconds` that it hears at once, and others."""


class DeployedMatcher(Protocol):
    """A fusion encoder of a bundle."""

    reader: TextReader
    """Makes token ids of texts."""

    def __call__(self, text: str, context: np.ndarray) -> Values:
        """Read a text together with the vectors of a picture."""
        ...


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
    match: _Worst = field(default_factory=_Worst)
    """The probability that a text describes a picture."""
    notes: list[str] = field(default_factory=list)
    """What was left out or done otherwise than in the library, and why."""

    def to_proofs(self, node_name: str) -> list[Proof]:
        """Return the proofs of what was compared."""
        rows = {
            "preprocessing": (self.prepared, PREPROCESSING_BOUND),
            "embedding": (self.embedding, EMBEDDING_BOUND),
            "match": (self.match, MATCH_BOUND),
        }
        proofs: list[Proof] = []
        for name, (worst, bound) in rows.items():
            if not worst.count:
                continue
            # told once: the other proofs are about the same inputs
            notes = [] if proofs else self.notes
            parts = [f"{worst.count} raw inputs", f"most at {worst.name}", *notes]
            proofs.append(
                make_proof(
                    f"dense == library: {name}",
                    node_name,
                    difference=worst.difference,
                    bound=bound,
                    detail=f"({'; '.join(parts)})",
                )
            )
        return proofs


@dataclass(kw_only=True)
class _FidelityCheck:
    """The comparison of one bundle with the libraries of its models."""

    spec: Spec
    """The pipeline."""
    pipeline: Pipeline
    """Its dense bundle."""
    pairs: Pairs
    """Ordinary inputs."""
    folder: Path
    """Where the files of odd inputs are written."""
    on_progress: StageProgress
    """Hears what is not compared, and why."""

    def leave_out(self, node_name: str, reason: str) -> None:
        """Tell what is not compared."""
        self.on_progress(f"dense == library: {node_name} is not compared: {reason}", None)

    def open_or_tell(self, node_name: str) -> Reference | None:
        """Return the library's own model of a node, or tell that there is none."""
        reference = open_reference(self.spec, node_name)
        if reference is None:
            node = self.spec.nodes[node_name]
            location = locate_node_source(node)
            reason = f"no answer of {location.library} for a {node.kind}"
            if location.has_random_weights:
                reason = "the library would draw other random weights"
            if location.library == "python":
                reason = "a model of one's own has no library"
            self.leave_out(node_name, reason)
        return reference

    def list_raw_inputs(self, node_name: str) -> list[RawInput]:
        """Return the raw inputs of a node: ordinary ones from the data, and odd ones."""
        kind = get_kind(self.spec.nodes[node_name].kind)
        input_type = next(iter(kind.inputs.values())).types[0]
        if input_type == "image":
            return list_pictures(self.pairs, self.folder)
        if input_type == "audio":
            deployed = cast(DeployedHearing, self.pipeline.nodes[node_name])
            return list_sounds(self.pairs, float(deployed.options["seconds"]))
        return list_texts(self.pairs.texts)

    def prove_node(self, node_name: str) -> list[Proof]:
        """Compare one encoder, and the generators and fusion encoders that read it."""
        kind = get_kind(self.spec.nodes[node_name].kind)
        if kind.writes_text or kind.fuses:
            return []
        raw_inputs: list[RawInput] = []
        proofs: list[Proof] = []
        # One library model at a time is in memory, and those of the nodes that read it.
        reference = self.open_or_tell(node_name)
        if isinstance(reference, LibraryReference):
            raw_inputs = self.list_raw_inputs(node_name)
            comparison = _compare_node(
                cast(DeployedEncoder, self.pipeline.nodes[node_name]),
                reference,
                node_name=node_name,
                raw_inputs=raw_inputs,
            )
            proofs += comparison.to_proofs(node_name)
        for reader_name, reader in self.spec.list_model_nodes().items():
            if find_token_source(self.spec, reader_name) != node_name:
                continue
            if not isinstance(reference, LibraryReference):
                self.leave_out(reader_name, f"it reads {node_name}, which is not compared")
            elif get_kind(reader.kind).writes_text:
                proofs += self._prove_texts(reader_name, encoder=reference, raw_inputs=raw_inputs)
            elif get_kind(reader.kind).fuses:
                proofs += self._prove_matches(reader_name, raw_inputs=raw_inputs)
        return proofs

    def _prove_texts(
        self, writer_name: str, *, encoder: LibraryReference, raw_inputs: Sequence[RawInput]
    ) -> list[Proof]:
        """Compare what a generator writes of raw inputs, token for token."""
        source = find_token_source(self.spec, writer_name)
        node = self.spec.nodes[writer_name]
        is_one_checkpoint = node.source == self.spec.nodes[source].source
        # A generator of another checkpoint is given what the encoder's library makes.
        writer: object = encoder if is_one_checkpoint else self.open_or_tell(writer_name)
        if not isinstance(writer, LibraryWriter):
            if writer is not None:
                self.leave_out(writer_name, f"the library of {source} writes no text")
            return []
        notes: list[str] = []
        inputs: list[WritingInput] = []
        for raw in choose_written_inputs(raw_inputs):
            try:
                tokens = self.pipeline.nodes[source](raw.value)["tokens"]
            except (DataError, MissingPackage) as error:
                notes.append(f"without {raw.name}: {_summarize(error)}")
                continue
            references = raw.references
            if get_kind(self.spec.nodes[source].kind).stream_modality == "audio":
                references = tuple(
                    reference for reference in references if not is_silent(np.asarray(reference))
                )
            if not len(tokens) and not references:
                notes.append(f"of {raw.name} nothing is written, on purpose")
                continue
            if not is_one_checkpoint:
                references = tuple(encoder.compute_tokens(reference) for reference in references)
                if any(vectors is None for vectors in references):
                    self.leave_out(writer_name, f"the library of {source} gives no vectors")
                    return []
            inputs.append(WritingInput(name=raw.name, tokens=tokens, references=references))
        deployed = cast(DeployedWriter, self.pipeline.nodes[writer_name])
        request = make_request(node, deployed.generation)
        comparison_result = compare_texts(deployed, writer, request=request, inputs=inputs)
        if comparison_result is None:
            self.leave_out(writer_name, "its library writes no text with such options")
            return []
        return [make_text_proof(writer_name, comparison_result, notes=notes)]

    def _prove_matches(self, reader_name: str, *, raw_inputs: Sequence[RawInput]) -> list[Proof]:
        """Compare what a fusion encoder makes of pictures and texts together."""
        source = find_token_source(self.spec, reader_name)
        if self.spec.nodes[reader_name].source != self.spec.nodes[source].source:
            self.leave_out(reader_name, f"it and {source} come from two checkpoints")
            return []
        matcher = self.open_or_tell(reader_name)
        if not isinstance(matcher, LibraryMatcher):
            return []
        comparison = _NodeComparison()
        deployed = cast(DeployedMatcher, self.pipeline.nodes[reader_name])
        pictures = raw_inputs[: len(self.pairs)]
        for raw, text in zip(pictures, self.pairs.texts, strict=True):
            expected = matcher.match(raw.references[0], text)
            tokens = self.pipeline.nodes[source](raw.value)["tokens"]
            actual = deployed(text, tokens)
            ids = deployed.reader.read([text]).ids[0]
            comparison.prepared.add(_compare_prepared(ids, expected.prepared), raw.name)
            comparison.embedding.add(
                _compare_embeddings(actual["embedding"][0], expected.embedding), raw.name
            )
            probability = 1 / (1 + np.exp(-float(actual["scores"][0])))
            comparison.match.add(abs(probability - expected.match), raw.name)
        return comparison.to_proofs(reader_name)


def prove_fidelity(
    spec: Spec,
    *,
    bundle: Path,
    data: Dataset,
    on_progress: StageProgress = ignore_progress,
    input_count: int = FIDELITY_INPUTS,
) -> list[Proof]:
    """Compare the answers of a dense bundle to raw inputs with those of the models' libraries.

    Args:
        spec: The pipeline.
        bundle: Its dense bundle.
        data: Its validation split gives the raw inputs; odd ones are made of them.
        on_progress: Hears of every node that has nothing to be compared with, such as a model of
            the user's own module.
        input_count: Inputs of that split that are sent both ways, at most.

    Returns:
        Proofs `dense == library: ...` for every node whose library is known; failed ones included.

    Raises:
        ModelError: A library refuses an ordinary input.
    """
    proofs: list[Proof] = []
    with tempfile.TemporaryDirectory() as scratch:
        check = _FidelityCheck(
            spec=spec,
            pipeline=load_bundle(bundle),
            pairs=data.load("val", input_count),
            folder=Path(scratch),
            on_progress=on_progress,
        )
        for node_name in spec.list_model_nodes():
            proofs += check.prove_node(node_name)
    return proofs


def open_reference(spec: Spec, node_name: str) -> Reference | None:
    """Return the library's own model of a node, or None where there is no such library."""
    node = spec.nodes[node_name]
    location = locate_node_source(node)
    key = f"{location.library}/{node.kind}"
    if LIBRARY_REFERENCES.find_problem(key) or location.has_random_weights:
        return None
    folder = fetch_folder(location)
    name = str(folder) if folder else location.name
    if folder and location.library == "open_clip":
        name = f"local-dir:{folder}"
    request = ReferenceRequest(
        location=name,
        pretrained=location.pretrained,
        revision=location.revision,
        max_tokens=node.max_tokens,
    )
    reference: Reference = LIBRARY_REFERENCES.get(key)(request)
    return reference


def choose_written_inputs(raw_inputs: Sequence[RawInput]) -> list[RawInput]:
    """Return the first ordinary inputs and the first odd ones: texts are written of these."""
    ordinary = [raw for raw in raw_inputs if not raw.is_odd]
    odd_inputs = [raw for raw in raw_inputs if raw.is_odd]
    return [*ordinary[:MAX_WRITTEN_INPUTS], *odd_inputs[:MAX_WRITTEN_INPUTS]]


def _compare_node(
    deployed: DeployedEncoder,
    reference: LibraryReference,
    *,
    node_name: str,
    raw_inputs: Sequence[RawInput],
) -> _NodeComparison:
    """Send raw inputs both ways through one node.

    Raises:
        ModelError: The library refuses an ordinary input.
    """
    comparison = _NodeComparison()
    departures: dict[str, list[str]] = {}
    for raw in raw_inputs:
        try:
            answers = [reference.answer(raw_reference) for raw_reference in raw.references]
        except Exception as error:  # libraries raise what they like
            if not raw.is_odd:
                raise ModelError(
                    f"{node_name}: its library can't read {raw.name} of the data: "
                    f"{_summarize(error)}"
                ) from error
            comparison.notes.append(f"its library refuses {raw.name} ({_summarize(error)})")
            continue
        if raw.departure:
            departures.setdefault(raw.departure, []).append(raw.name)
        _compare_input(comparison, raw, deployed=deployed, answers=answers)
    if not comparison.embedding.count:
        comparison.notes.append("its library has no embedding of its own")
    for departure, names in departures.items():
        comparison.notes.append(f"{departure}, on purpose: {', '.join(names)}")
    return comparison


def _compare_input(
    comparison: _NodeComparison,
    raw: RawInput,
    *,
    deployed: DeployedEncoder,
    answers: Sequence[LibraryAnswer],
) -> None:
    """Add one raw input to a comparison, in place."""
    try:
        prepared = deployed.prepare(raw.value)
    except MissingPackage as error:
        comparison.notes.append(f"without {raw.name}: {_summarize(error)}")
        return
    except DataError as error:
        if not raw.is_odd:
            raise
        comparison.prepared.add(float("inf"), f"{raw.name}, refused: {_summarize(error)}")
        return
    expected = [answer.prepared for answer in answers]
    comparison.prepared.add(_compare_windows(prepared, expected), raw.name)
    if raw.decoded is not None:
        decoded_value = deployed.prepare(raw.decoded)
        name = f"{raw.name} as the data decode it"
        comparison.prepared.add(_compare_windows(decoded_value, expected), name)
    own_embeddings = [answer.embedding for answer in answers if answer.embedding is not None]
    if own_embeddings:
        embeddings = deployed(raw.value)["embedding"]
        for actual, own in zip(embeddings, own_embeddings, strict=False):
            comparison.embedding.add(_compare_embeddings(actual, own), raw.name)


def _compare_windows(actual: np.ndarray, expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference over the windows of one input; as many are expected."""
    if len(actual) != len(expected):
        return float("inf")
    differences = [_compare_prepared(actual[i], window) for i, window in enumerate(expected)]
    return max(differences)


def _compare_prepared(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of what two sides give a model; token ids must be equal."""
    if np.issubdtype(expected.dtype, np.integer):
        return _compare_ids(actual.tolist(), expected.tolist())
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max())


def _compare_ids(actual: list[int], expected: list[int]) -> float:
    """Return 0 for equal token ids, apart from padding behind them, and infinity for others."""
    common_length = min(len(actual), len(expected))
    padding = [*actual[common_length:], *expected[common_length:]]
    if actual[:common_length] == expected[:common_length] and len(set(padding)) <= 1:
        return 0.0
    return float("inf")


def _compare_embeddings(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return 1 - cosine of two vectors; `expected` has length 1."""
    vector = np.asarray(actual, np.float64)
    if vector.shape != expected.shape:
        return float("inf")
    length = max(float(np.linalg.norm(vector)), 1e-12)
    return max(1.0 - float(vector @ expected) / length, 0.0)


def _summarize(error: Exception) -> str:
    """Return the beginning of an error's text."""
    return f"{type(error).__name__}: {error}"[:SHOWN_ERROR_CHARACTERS]
