"""References between the nodes of a spec: who reads whom, in which order, and how often a request
runs each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import NamedTuple, TypeVar

from mmcompress.graph.ports import get_kind
from mmcompress.spec.schema import Node, Spec

Value = TypeVar("Value")


class NodeRef(NamedTuple):
    """A value in the graph: what a spec writes as `vision.tokens`."""

    node: str
    """The node that gives the value, or the name of a pipeline input."""
    port: str = ""
    """Its output port. Empty: the value of a pipeline input."""


def parse_reference(reference: str) -> NodeRef:
    """Parse `vision.tokens`, or the name of a pipeline input."""
    node, _, port = reference.partition(".")
    return NodeRef(node, port)


def find_source_nodes(spec: Spec, name: str) -> set[str]:
    """Return the nodes that a node reads."""
    sources = {parse_reference(reference).node for reference in spec.nodes[name].inputs.values()}
    return sources & set(spec.nodes)


def find_token_reference(spec: Spec, name: str) -> NodeRef | None:
    """Return the output whose tokens a node reads, None when it reads none."""
    node = spec.nodes[name]
    for port in get_kind(node.kind).token_ports:
        return parse_reference(node.inputs[port])
    return None


def find_token_source(spec: Spec, name: str) -> str:
    """Return the node whose tokens a node reads, or an empty name when it reads none."""
    reference = find_token_reference(spec, name)
    return reference.node if reference else ""


def sort_nodes(spec: Spec) -> tuple[str, ...]:
    """Return the nodes in an order in which every input is there.

    Raises:
        graphlib.CycleError: Some nodes read each other.
    """
    graph = {name: find_source_nodes(spec, name) for name in spec.nodes}
    return tuple(TopologicalSorter(graph).static_order())


def find_value_type(spec: Spec, reference: str) -> str | None:
    """Return the value type behind a reference, None when nothing has that name."""
    name, port = parse_reference(reference)
    if not port:
        return spec.inputs.get(name)
    if name not in spec.nodes:
        return None
    return get_kind(spec.nodes[name].kind).outputs.get(port)


def find_text_source(spec: Spec, name: str) -> str:
    """Return the node, or the input of the pipeline, whose text a node reads; empty: it reads
    none."""
    node = spec.nodes[name]
    for port in get_kind(node.kind).text_ports:
        if port in node.inputs:
            return parse_reference(node.inputs[port]).node
    return ""


def count_decode_steps(spec: Spec, calls: Mapping[str, float]) -> dict[str, float]:
    """Return the decode steps of a request behind every model: its own, or those of the generator
    whose text it reads.

    Args:
        spec: The pipeline.
        calls: Session calls per request, by `node/graph`.

    Returns:
        Steps by node; 1 where no generator is involved.
    """
    steps: dict[str, float] = {}
    for name in spec.list_model_nodes():
        writer = find_text_source(spec, name) or name
        loop_graph = ""
        if writer in spec.nodes:
            loop_graph = get_kind(spec.nodes[writer].kind).loop_graph
        steps[name] = calls.get(f"{writer}/{loop_graph}", 1.0)
    return steps


def count_texts_per_request(spec: Spec) -> dict[str, int]:
    """Return how many texts a request holds in every model at once: those that a generator
    writes."""
    counts: dict[str, int] = {}
    for name, node in spec.list_model_nodes().items():
        counts[name] = _count_texts(node)
        for port in get_kind(node.kind).text_ports:
            reference = node.inputs.get(port, "")
            if find_value_type(spec, reference) == "texts":
                counts[name] = _count_texts(spec.nodes[parse_reference(reference).node])
    return counts


def _count_texts(node: Node) -> int:
    """Return how many texts a node writes for an input."""
    return node.get_option(get_kind(node.kind).count_option, 1)


def find_unjoined_encoders(spec: Spec) -> tuple[str, ...]:
    """Return the encoders that no join compares: what their embedding is good for is not known.

    The embedding is an output of the pipeline, or nothing reads the encoder at all.
    """
    references = {r for node in spec.nodes.values() for r in node.inputs.values()}
    read_nodes = {parse_reference(reference).node for reference in references}
    unjoined: list[str] = []
    for name, node in spec.list_model_nodes().items():
        port = get_kind(node.kind).embedding_output
        embedding = f"{name}.{port}"
        if not port or embedding in references:
            continue
        if embedding in spec.outputs.values() or name not in read_nodes:
            unjoined.append(name)
    return tuple(unjoined)


def name_by_node(figures: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """Name figures of several nodes: `<figure>` when one node has it, `<figure>.<node>` when
    several do.

    Args:
        figures: Figures by name, by node.

    Returns:
        All figures by their own names, in the order of the nodes.
    """
    owners = Counter(figure for by_name in figures.values() for figure in by_name)
    named: dict[str, Value] = {}
    for node, by_name in figures.items():
        for figure, value in by_name.items():
            key = figure if owners[figure] == 1 else f"{figure}.{node}"
            named[key] = value
    return named
