"""TODO."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from graphlib import CycleError

from mmcompress.errors import SpecError, suggest_nearest
from mmcompress.graph.ports import GRADIENT_CRITERIA, METRIC_NEEDS, NODE_KINDS, NODE_OPTIONS
from mmcompress.graph.references import (
    find_unjoined_encoders,
    split_reference,
    topological_order,
    value_type_of,
)
from mmcompress.registry import METRICS
from mmcompress.spec.schema import Node, Spec

MakeError = Callable[[tuple[str, ...], str], SpecError]


RESERVED_NODE_NAMES = ("units",)
"""Beside the weights of each node lies a file of that name."""


NODE_DEFAULTS = {f.name: f.default for f in fields(Node)}


def validate_graph(spec: Spec, error: MakeError) -> None:
    """Raise the `SpecError` of the first thing wrong with the graph."""
    if both := set(spec.inputs) & set(spec.nodes):
        raise error(("nodes", min(both)), f"'{min(both)}' is also the name of a pipeline input")
    sources = [
        *spec.inputs,
        *(f"{n}.{p}" for n, node in spec.nodes.items() for p in NODE_KINDS[node.kind].outputs),
    ]
    for name, node in spec.nodes.items():
        kind, at = NODE_KINDS[node.kind], ("nodes", name)
        if name in RESERVED_NODE_NAMES or not re.fullmatch(r"\w[\w-]*", name):
            raise error(
                at,
                f"choose another name: letters, digits, _ and -, and not {' or '.join(RESERVED_NODE_NAMES)}",
            )
        if kind.model and not node.source:
            raise error(
                at,
                "'source' is missing: a model needs weights "
                "(embedded:, open_clip:, transformers:, pip:, python: or a folder)",
            )
        for option, kinds in NODE_OPTIONS.items():
            if node.kind not in kinds and getattr(node, option) != NODE_DEFAULTS[option]:
                raise error(
                    (*at, option), f"a {node.kind} has no {option}, only {' and '.join(kinds)}"
                )
        for port in kind.inputs:
            if port not in node.inputs:
                raise error((*at, "inputs"), f"the port '{port}' of a {node.kind} is not connected")
        for port, reference in node.inputs.items():
            here = (*at, "inputs", port)
            ports = kind.inputs | kind.optional
            if port not in ports:
                raise error(
                    here, f"a {node.kind} has no port '{port}'; {suggest_nearest(port, ports)}"
                )
            found = value_type_of(spec, reference)
            if found is None:
                raise error(
                    here, f"nothing is named '{reference}'; {suggest_nearest(reference, sources)}"
                )
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
        raise error(
            ("nodes", ring[0], "inputs"), f"the nodes form a cycle: {' -> '.join(ring)}"
        ) from None
    for name, reference in spec.outputs.items():
        if value_type_of(spec, reference) is None:
            raise error(
                ("outputs", name),
                f"nothing is named '{reference}'; {suggest_nearest(reference, sources)}",
            )
    if not spec.model_nodes():
        raise error(("nodes",), "no node is a model: there is nothing to compress")
    if list(spec.inputs.values()) not in (["image"], ["audio"]):
        raise error(("inputs",), "a pipeline takes exactly one input, an image or audio")
    for name, node in spec.nodes.items():
        query = spec.nodes.get(split_reference(node.inputs.get("query", ""))[0])
        if node.kind == "lookup" and (query is None or query.kind != "text_encoder"):
            raise error(
                ("nodes", name, "inputs", "query"),
                "must be the embedding of a text_encoder: it embeds the list too",
            )
    for name in spec.limits.node_ms:
        if name not in spec.model_nodes():
            raise error(
                ("limits", "node_ms", name),
                f"no model is named '{name}'; {suggest_nearest(name, spec.model_nodes())}",
            )
    by_gradient = [c for c in GRADIENT_CRITERIA if c in re.findall(r"\w+", spec.prune.importance)]
    for name in find_unjoined_encoders(spec) if by_gradient else ():
        raise error(
            ("prune", "importance"),
            f"{by_gradient[0]} says nothing of the embedding of '{name}', which no joining node reads; "
            "reconstruction, the default, does (with prune.sensitivity: measured)",
        )
    if not spec.metrics:
        raise error(
            ("metrics",), f"name at least one to judge by (known: {', '.join(METRICS.names())})"
        )
    have = {node.kind for node in spec.nodes.values()}
    for i, metric in enumerate(spec.metrics):
        if (needed := METRIC_NEEDS.get(metric)) and not have & set(needed):
            raise error(
                ("metrics", str(i)),
                f"'{metric}' needs a node of kind {' or '.join(needed)} to judge by",
            )
        if metric == "embedding" and not find_unjoined_encoders(spec):
            raise error(
                ("metrics", str(i)),
                "'embedding' is for embeddings that no joining node reads: here is none",
            )
