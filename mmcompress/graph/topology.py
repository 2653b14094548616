"""The pipeline as a graph: the ports of each kind of node, the order of execution, and what is wrong with a spec."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from graphlib import CycleError, TopologicalSorter

from mmcompress.errors import SpecError
from mmcompress.registry import METRICS, suggest_nearest
from mmcompress.spec.schema import Node, Spec

MakeError = Callable[[tuple[str, ...], str], SpecError]


@dataclass(frozen=True)
class NodeKind:
    """Ports of a kind of node and their value types. `stream` is the port (or modality) its own layers carry."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    stream: str = ""
    modality: str = ""
    """Of what the node generates itself, beside what it reads."""
    model: bool = True
    optional: dict[str, str] = field(default_factory=dict)
    """Further input ports that may stay open."""


NODE_KINDS = {
    "image_encoder": NodeKind({"image": "image"}, {"embedding": "vector", "tokens": "sequence"}, stream="image"),
    "audio_encoder": NodeKind({"audio": "audio"}, {"embedding": "vector", "tokens": "sequence"}, stream="audio"),
    "text_encoder": NodeKind({"text": "text"}, {"embedding": "vector"}, stream="text"),
    "text_decoder": NodeKind(
        {"context": "sequence"}, {"text": "text", "texts": "text", "scores": "scores"}, modality="text"
    ),
    "nearest": NodeKind(
        {"query": "vector", "keys": "vector", "values": "text"},
        {"best": "text"},
        model=False,
        optional={"scores": "scores"},
    ),
    "lookup": NodeKind({"query": "vector"}, {"best": "text", "score": "number", "place": "number"}, model=False),
}
METRIC_NEEDS = {
    "retrieval": ("nearest",),
    "caption": ("nearest", "text_decoder"),
    "wer": ("text_decoder",),
    "endings": ("text_decoder",),
    "agreement": ("nearest", "lookup", "text_decoder"),
}
"""A metric -> kinds of node of which it needs one."""


GRADIENT_CRITERIA = ("fisher", "taylor", "movement")
"""Criteria that follow the gradient of the pipeline's own loss."""


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
    return {n: at(split_reference(node.inputs.get("text", n))[0]) for n, node in spec.model_nodes().items()}


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
    return tuple(n for n, node in spec.model_nodes().items() if node.kind != "text_decoder" and alone(n))


NODE_OPTIONS = {
    "source": ("image_encoder", "audio_encoder", "text_encoder", "text_decoder"),
    "candidates": ("text_decoder",),
    "max_tokens": ("text_decoder", "text_encoder"),
    "prompt": ("text_decoder",),
    "prior": ("nearest",),
    "texts": ("lookup",),
}
"""An option of a node -> the kinds that have it."""
RESERVED_NODE_NAMES = ("units",)
"""Beside the weights of each node lies a file of that name."""
NODE_DEFAULTS = {f.name: f.default for f in fields(Node)}


def validate_graph(spec: Spec, error: MakeError) -> None:
    """Raise the `SpecError` of the first thing wrong with the graph."""
    if both := set(spec.inputs) & set(spec.nodes):
        raise error(("nodes", min(both)), f"'{min(both)}' is also the name of a pipeline input")
    sources = [*spec.inputs, *(f"{n}.{p}" for n, node in spec.nodes.items() for p in NODE_KINDS[node.kind].outputs)]
    for name, node in spec.nodes.items():
        kind, at = NODE_KINDS[node.kind], ("nodes", name)
        if name in RESERVED_NODE_NAMES or not re.fullmatch(r"\w[\w-]*", name):
            raise error(
                at, f"choose another name: letters, digits, _ and -, and not {' or '.join(RESERVED_NODE_NAMES)}"
            )
        if kind.model and not node.source:
            raise error(
                at,
                "'source' is missing: a model needs weights "
                "(embedded:, open_clip:, transformers:, pip:, python: or a folder)",
            )
        for option, kinds in NODE_OPTIONS.items():
            if node.kind not in kinds and getattr(node, option) != NODE_DEFAULTS[option]:
                raise error((*at, option), f"a {node.kind} has no {option}, only {' and '.join(kinds)}")
        for port in kind.inputs:
            if port not in node.inputs:
                raise error((*at, "inputs"), f"the port '{port}' of a {node.kind} is not connected")
        for port, reference in node.inputs.items():
            here = (*at, "inputs", port)
            ports = kind.inputs | kind.optional
            if port not in ports:
                raise error(here, f"a {node.kind} has no port '{port}'; {suggest_nearest(port, ports)}")
            found = value_type_of(spec, reference)
            if found is None:
                raise error(here, f"nothing is named '{reference}'; {suggest_nearest(reference, sources)}")
            if found != ports[port]:
                fits = [s for s in sources if value_type_of(spec, s) == ports[port]]
                raise error(
                    here,
                    f"'{reference}' is a {found}, the port takes a {ports[port]} "
                    f"(these fit: {', '.join(fits) or 'none'})",
                )
    try:
        topological_order(spec)
    except CycleError as e:
        ring = list(reversed(e.args[1]))
        raise error(("nodes", ring[0], "inputs"), f"the nodes form a cycle: {' -> '.join(ring)}") from None
    for name, reference in spec.outputs.items():
        if value_type_of(spec, reference) is None:
            raise error(("outputs", name), f"nothing is named '{reference}'; {suggest_nearest(reference, sources)}")
    if not spec.model_nodes():
        raise error(("nodes",), "no node is a model: there is nothing to compress")
    if list(spec.inputs.values()) not in (["image"], ["audio"]):
        raise error(("inputs",), "a pipeline takes exactly one input, an image or audio")
    for name, node in spec.nodes.items():
        query = spec.nodes.get(split_reference(node.inputs.get("query", ""))[0])
        if node.kind == "lookup" and (query is None or query.kind != "text_encoder"):
            raise error(
                ("nodes", name, "inputs", "query"), "must be the embedding of a text_encoder: it embeds the list too"
            )
    for name in spec.limits.node_ms:
        if name not in spec.model_nodes():
            raise error(
                ("limits", "node_ms", name), f"no model is named '{name}'; {suggest_nearest(name, spec.model_nodes())}"
            )
    by_gradient = [c for c in GRADIENT_CRITERIA if c in re.findall(r"\w+", spec.prune.importance)]
    for name in find_unjoined_encoders(spec) if by_gradient else ():
        raise error(
            ("prune", "importance"),
            f"{by_gradient[0]} says nothing of the embedding of '{name}', which no joining node reads; "
            "reconstruction, the default, does (with prune.sensitivity: measured)",
        )
    if not spec.metrics:
        raise error(("metrics",), f"name at least one to judge by (known: {', '.join(METRICS.names())})")
    have = {node.kind for node in spec.nodes.values()}
    for i, metric in enumerate(spec.metrics):
        if (needed := METRIC_NEEDS.get(metric)) and not have & set(needed):
            raise error(("metrics", str(i)), f"'{metric}' needs a node of kind {' or '.join(needed)} to judge by")
        if metric == "embedding" and not find_unjoined_encoders(spec):
            raise error(("metrics", str(i)), "'embedding' is for embeddings that no joining node reads: here is none")
