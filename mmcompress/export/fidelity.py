"""The proof of fidelity: a dense bundle answers raw inputs as the library of each model does.

The other proofs start behind preprocessing and end before pooling and the end of a text. A fault
there stands in the dense pipeline as in the compressed one, so that "retained 100 %" holds for the
wrong thing. Here a raw input goes two ways: through the library's own processor, tokenizer, model
and `generate` (`mmcompress.models.reference`), and through the bundle.

How the answers of a kind of node are compared, its entry says (`NodeKind.fidelity`). What a raw
input is, the type of its first input port says (`InputType.list_raw_inputs`). A node that is not
compared is told, with the reason.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mmcompress.data.base import Dataset, Pairs
from mmcompress.export.odd_inputs import RawInput, RawInputRequest
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import find_token_reference, find_token_source
from mmcompress.models.reference.base import (
    LibraryMatcher,
    LibraryReference,
    LibraryWriter,
    ReferenceRequest,
)
from mmcompress.models.sources import fetch_folder, locate_node_source
from mmcompress.registry import INPUT_TYPES, LIBRARY_REFERENCES, resolve_entry
from mmcompress.results.records import Proof
from mmcompress.runtime.graph import Pipeline, load_bundle
from mmcompress.runtime.input_types import InputType
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.runtime.providers import CPU_PROVIDER
from mmcompress.spec.schema import Spec

FIDELITY_INPUTS = 16
"""Validation inputs that are sent both ways, beside the odd ones."""

Reference = LibraryReference | LibraryWriter | LibraryMatcher
"""A library's own model of a node. A kind of a plug-in may bring another one."""


@dataclass(frozen=True, kw_only=True)
class ComparedNode:
    """A node that was compared with its library, or could not be."""

    name: str
    """The node."""
    reference: object = None
    """The library's own model; None where there is nothing to compare with."""
    raw_inputs: tuple[RawInput, ...] = ()
    """What both sides were asked with. The nodes that read its tokens are asked with the same."""
    proofs: tuple[Proof, ...] = ()
    """What was proved."""


class NodeComparison(Protocol):
    """What the entry of a kind of node names as its `fidelity`."""

    def __call__(
        self, node_name: str, check: FidelityCheck, *, source: ComparedNode | None
    ) -> ComparedNode:
        """Compare a node with its library.

        Args:
            node_name: The node.
            check: The bundle and its data. It is told when there is nothing to compare.
            source: The node whose tokens it reads, as it was compared; None: it reads none.
        """
        ...


@dataclass(kw_only=True)
class FidelityCheck:
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
    left_out: set[str] = field(default_factory=set)
    """Nodes that are not compared, or not with every input."""

    def leave_out(self, node_name: str, reason: str) -> None:
        """Tell what is not compared."""
        self.left_out.add(node_name)
        self.on_progress(f"dense == library: {node_name} is not compared: {reason}", None)

    def open_or_tell(self, node_name: str) -> object:
        """Return the library's own model of a node, or tell that there is none and return None."""
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
        """Return the raw inputs of a node: ordinary ones from the data, and odd ones.

        Raises:
            KeyError: Its first input port takes nothing that a pipeline may be given.
        """
        list_raw_inputs = resolve_entry(self._get_input_type(node_name).list_raw_inputs)
        request = RawInputRequest(
            pairs=self.pairs, folder=self.folder, deployed=self.pipeline.nodes[node_name]
        )
        raw_inputs: list[RawInput] = list_raw_inputs(request)
        return raw_inputs

    def is_empty(self, node_name: str, reference: object) -> bool:
        """Return whether a raw input of a node holds nothing to answer, such as silence."""
        is_empty = self._get_input_type(node_name).is_empty
        return bool(is_empty) and bool(resolve_entry(is_empty)(reference))

    def _get_input_type(self, node_name: str) -> InputType:
        """Return the type of value that the first input port of a node takes."""
        kind = get_kind(self.spec.nodes[node_name].kind)
        input_type: InputType = INPUT_TYPES.get(next(iter(kind.inputs.values())).types[0])
        return input_type

    def find_token_port(self, node_name: str) -> str:
        """Return the output port whose tokens a node reads."""
        reference = find_token_reference(self.spec, node_name)
        return reference.port if reference else ""

    def prove_node(self, node_name: str, source: ComparedNode | None = None) -> list[Proof]:
        """Compare a node with its library, and then the nodes that read its tokens.

        One library model at a time is in memory, and those of the nodes that read it.
        """
        compared = self._compare(node_name, source)
        if not compared.proofs and node_name not in self.left_out:
            self.leave_out(node_name, "its comparison with the library proved nothing")
        proofs = list(compared.proofs)
        for reader_name in self.spec.list_model_nodes():
            if find_token_source(self.spec, reader_name) == node_name:
                proofs += self.prove_node(reader_name, compared)
        return proofs

    def _compare(self, node_name: str, source: ComparedNode | None) -> ComparedNode:
        """Compare one node as the entry of its kind says, or tell why it is not compared."""
        kind_name = self.spec.nodes[node_name].kind
        fidelity = get_kind(kind_name).fidelity
        if source and source.reference is None:
            self.leave_out(node_name, f"it reads {source.name}, which is not compared")
        elif not fidelity:
            self.leave_out(node_name, f"the kind {kind_name} names no way to compare")
        else:
            compare: NodeComparison = resolve_entry(fidelity)
            return compare(node_name, self, source=source)
        return ComparedNode(name=node_name)


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
        on_progress: Hears of every node that is not compared, such as a model of the user's own
            module.
        input_count: Inputs of that split that are sent both ways, at most.

    Returns:
        Proofs `dense == library: ...` for every node whose library is known; failed ones included.

    Raises:
        ModelError: A library refuses an ordinary input.
    """
    proofs: list[Proof] = []
    with tempfile.TemporaryDirectory() as scratch:
        check = FidelityCheck(
            spec=spec,
            # What is proved is the export. What a provider makes of it is judged by its answers.
            pipeline=load_bundle(bundle, provider=CPU_PROVIDER),
            pairs=data.load("val", input_count),
            folder=Path(scratch),
            on_progress=on_progress,
        )
        for node_name in spec.list_model_nodes():
            if not find_token_source(spec, node_name):
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
        max_tokens=node.get_option("max_tokens", 0),
    )
    reference: Reference = LIBRARY_REFERENCES.get(key)(request)
    return reference
