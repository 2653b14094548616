"""The pipeline as a graph: the ports of each kind of node, the order of execution, and what is wrong with a spec."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import TopologicalSorter

from mmcompress.graph.ports import NODE_KINDS
from mmcompress.spec.schema import Spec


def split_reference(reference: str) -> tuple[str, str]:
    """`vision.tokens` -> ("vision", "tokens"); a pipeline input has no port: ("image", "")."""
    node, _, port = reference.partition(".")
    return node, port


def topological_order(spec: Spec) -> tuple[str, ...]:
    """Nodes in an order in which every input is there. Raises `graphlib.CycleError`."""
    return tuple(TopologicalSorter({n: source_nodes(spec, n) for n in spec.nodes}).static_order())


def source_nodes(spec: Spec, node: str) -> set[str]:
    """The nodes that a node reads."""
    return {split_reference(r)[0] for r in spec.nodes[node].inputs.values()} & set(spec.nodes)


def value_type_of(spec: Spec, reference: str) -> str | None:
    """The value type behind a reference, None where there is nothing."""
    node, port = split_reference(reference)
    if not port:
        return spec.inputs.get(node)
    return NODE_KINDS[spec.nodes[node].kind].outputs.get(port) if node in spec.nodes else None


def decode_steps_by_node(spec: Spec, calls: Mapping[str, float]) -> dict[str, float]:
    """Decode steps of a request behind every model: its own or those of the generator whose text it reads.

    `calls`: session calls per request by `node/graph`.
    """
    at = lambda name: calls.get(f"{name}/step", 1.0)
    return {
        n: at(split_reference(node.inputs.get("text", n))[0])
        for n, node in spec.model_nodes().items()
    }


def texts_per_request(spec: Spec) -> dict[str, int]:
    """Texts of a request in every model at once: those a generator writes, all of which a tower may read."""
    found = {}
    for n, node in spec.model_nodes().items():
        source, port = split_reference(node.inputs.get("text", ""))
        found[n] = spec.nodes[source].candidates if port == "texts" else node.candidates
    return found


def find_unjoined_encoders(spec: Spec) -> tuple[str, ...]:
    """Encoders whose embedding is an output of the pipeline, or whose outputs nothing reads, and no joining node reads
    it: what it is good for is not known."""
    read = {r for node in spec.nodes.values() for r in node.inputs.values()}
    nodes, given = {split_reference(r)[0] for r in read}, {*spec.outputs.values()}
    alone = lambda n: f"{n}.embedding" not in read and (f"{n}.embedding" in given or n not in nodes)
    return tuple(
        n for n, node in spec.model_nodes().items() if node.kind != "text_decoder" and alone(n)
    )
