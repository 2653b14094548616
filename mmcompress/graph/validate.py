"""Finds what is wrong with the graph of a spec: names, ports, value types, cycles, and what metrics
and criteria need."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from graphlib import CycleError

from mmcompress.errors import SpecError, shorten, suggest_nearest
from mmcompress.graph.inputs import REFERENCE_TYPE
from mmcompress.graph.judged_nodes import find_judged_nodes
from mmcompress.graph.losses import list_known_losses
from mmcompress.graph.ports import NodeKind, get_kind
from mmcompress.graph.references import (
    find_unjoined_encoders,
    find_value_type,
    parse_reference,
    sort_nodes,
)
from mmcompress.registry import IMPORTANCE, METRICS, NODE_KINDS
from mmcompress.runtime.check_manifest import MAX_NODES
from mmcompress.spec.schema import WHOLE_REQUEST, Spec

MakeError = Callable[[tuple[str, ...], str], SpecError]
"""Makes the error at a place in the spec: (path of keys, message)."""

Problem = tuple[tuple[str, ...], str]
"""What is wrong: the path of keys to it, and a message."""

UNSAFE_SIGNS = ("/", "\\", "\0")
"""What the name of a pipeline may not hold: it is a part of the names of folders."""

RESERVED_NODE_NAMES = ("units",)
"""Names that no node may have: a file of that name lies beside the weights of each node."""

MODEL_OPTIONS = ("source", "rewind")
"""Keys of a node that say where weights come from."""


def raise_problems(problems: Sequence[Problem], error: MakeError) -> None:
    """Raise all problems in one error, or nothing when there are none.

    Args:
        problems: What is wrong with a spec.
        error: Makes the error at a place in the spec.

    Raises:
        SpecError: Something is wrong; the message has one line for each problem.
    """
    if problems:
        messages = [str(error(path, message)) for path, message in problems]
        raise SpecError("\n".join(dict.fromkeys(messages)))


def list_problems(
    spec: Spec, *, is_judged: bool = True, unread_names: frozenset[str] = frozenset()
) -> list[Problem]:
    """Return everything that is wrong with the graph of a spec.

    What asks for the order of the nodes waits until every reference leads somewhere.

    Args:
        spec: The pipeline.
        is_judged: Whether its metrics count. An export asks for none.
        unread_names: Nodes and inputs that the spec lacks since their values are wrong: references
            to them are let pass.
    """
    problems = _check_names(spec)
    problems += _check_limits(spec, unread_names)
    problems += _check_losses(spec)
    if not unread_names:
        problems += _check_inputs(spec)
    graph_problems: list[Problem] = []
    for name in spec.nodes:
        graph_problems += _check_sources(spec, name)
        graph_problems += _check_ports(spec, name, unread_names=unread_names)
    graph_problems += _check_outputs(spec, unread_names)
    graph_problems = graph_problems or _check_order(spec)
    if graph_problems or unread_names:
        return problems + graph_problems
    problems += _check_lists(spec)
    problems += _check_importance(spec)
    if is_judged:
        problems += _check_metrics(spec)
    return problems


def _check_names(spec: Spec) -> list[Problem]:
    problems: list[Problem] = []
    if not spec.name.strip() or any(sign in spec.name for sign in UNSAFE_SIGNS):
        message = (
            f"'{shorten(spec.name)}' can't be part of a folder's name; a run's folder is called"
            " after it: write it without / and \\"
        )
        problems.append((("name",), message))
    if len(spec.nodes) > MAX_NODES:
        message = f"{len(spec.nodes)} nodes: a bundle holds at most {MAX_NODES}"
        problems.append((("nodes",), message))
    for name in sorted(set(spec.inputs) & set(spec.nodes)):
        problems.append(
            (("nodes", name), f"'{shorten(name)}' is also the name of a pipeline input")
        )
    for name in spec.nodes:
        if name in RESERVED_NODE_NAMES or not re.fullmatch(r"\w[\w-]*", name):
            reserved = " or ".join(RESERVED_NODE_NAMES)
            message = f"choose another name: letters, digits, _ and -, and not {reserved}"
            problems.append((("nodes", name), message))
    return problems


def _check_sources(spec: Spec, name: str) -> list[Problem]:
    """Check that a model has weights, and that nothing else does."""
    node = spec.nodes[name]
    kind = get_kind(node.kind)
    problems: list[Problem] = []
    if kind.is_model and not node.source:
        sources = "embedded:, open_clip:, transformers:, pip:, python: or a folder"
        message = f"'source' is missing: a model needs weights ({sources})"
        problems.append((("nodes", name), message))
    for option in MODEL_OPTIONS:
        if not kind.is_model and getattr(node, option):
            message = f"{_add_article(node.kind)} has no {option}: it is no model"
            problems.append((("nodes", name, option), message))
    return problems


def _check_ports(spec: Spec, name: str, *, unread_names: frozenset[str]) -> list[Problem]:
    """Check that every port of a node is connected to a value that it accepts."""
    node = spec.nodes[name]
    kind = get_kind(node.kind)
    problems: list[Problem] = []
    for port, expected in kind.inputs.items():
        if port not in node.inputs and not expected.optional:
            message = f"the port '{port}' of {_add_article(node.kind)} is not connected"
            problems.append((("nodes", name, "inputs"), message))
    for port, reference in node.inputs.items():
        if parse_reference(reference).node in unread_names:
            continue
        message = _check_connection(spec, kind, port=port, reference=reference, kind_name=node.kind)
        if message:
            problems.append((("nodes", name, "inputs", port), message))
    return problems


def _check_connection(
    spec: Spec, kind: NodeKind, *, port: str, reference: str, kind_name: str
) -> str:
    """Return what is wrong with one connection, or an empty text."""
    if port not in kind.inputs:
        nearest = suggest_nearest(port, kind.inputs)
        return f"{_add_article(kind_name)} has no port '{shorten(port)}'; {nearest}"
    value_type = find_value_type(spec, reference)
    if value_type is None:
        return _describe_unknown_value(spec, reference)
    accepted_types = kind.inputs[port].types
    if value_type in accepted_types:
        return ""
    fitting_values = [
        value for value in _list_values(spec) if find_value_type(spec, value) in accepted_types
    ]
    return (
        f"'{reference}' is {_add_article(value_type)}, the port takes "
        f"{_add_article(' or '.join(accepted_types))} "
        f"(these fit: {', '.join(fitting_values) or 'none'})"
    )


def _describe_unknown_value(spec: Spec, reference: str) -> str:
    """Say what is wrong with a reference that leads nowhere.

    Where there is such a node, what another node gives would be another thing.
    """
    node_name, _, port = reference.partition(".")
    node = spec.nodes.get(node_name)
    if node is None or not port:
        nearest = suggest_nearest(reference, _list_values(spec))
        return f"nothing is named '{shorten(reference)}'; {nearest}"
    outputs = get_kind(node.kind).outputs
    fitting_kinds = [name for name in NODE_KINDS.list_names() if port in get_kind(name).outputs]
    hint = f"; one of these kinds would: {', '.join(fitting_kinds)}" if fitting_kinds else ""
    return (
        f"'{node_name}' is {_add_article(node.kind)} and gives no '{shorten(port)}' "
        f"({suggest_nearest(port, outputs)}{hint})"
    )


def _add_article(value_type: str) -> str:
    """Return a value type with the article that it takes; plural ones take none."""
    if value_type.endswith("s"):
        return value_type
    return f"an {value_type}" if value_type[0] in "aeiou" else f"a {value_type}"


def _list_values(spec: Spec) -> list[str]:
    """Return every reference that the graph offers: pipeline inputs and the outputs of nodes."""
    values = list(spec.inputs)
    for name, node in spec.nodes.items():
        values += [f"{name}.{port}" for port in get_kind(node.kind).outputs]
    return values


def _check_outputs(spec: Spec, unread_names: frozenset[str]) -> list[Problem]:
    problems: list[Problem] = []
    if not spec.outputs:
        values = suggest_nearest("", _list_values(spec))
        message = f"name at least one value that the pipeline gives; {values}"
        problems.append((("outputs",), message))
    for name, reference in spec.outputs.items():
        if parse_reference(reference).node in unread_names:
            continue
        if find_value_type(spec, reference) is None:
            problems.append((("outputs", name), _describe_unknown_value(spec, reference)))
    return problems


def _check_order(spec: Spec) -> list[Problem]:
    """Check that no nodes read each other."""
    try:
        sort_nodes(spec)
    except CycleError as cycle:
        ring = list(reversed(cycle.args[1]))
        message = f"the nodes form a cycle: {' -> '.join(ring)}"
        return [(("nodes", ring[0], "inputs"), message)]
    return []


def _check_inputs(spec: Spec) -> list[Problem]:
    problems: list[Problem] = []
    if not spec.list_model_nodes():
        problems.append((("nodes",), "no node is a model: there is nothing to compress"))
    texts = [name for name, kind in spec.inputs.items() if kind == REFERENCE_TYPE]
    if len(spec.inputs) != 1 and (len(spec.inputs), len(texts)) != (2, 1):
        message = (
            "a pipeline takes one input (an image, audio or a text), or two: "
            "an image or audio, and a text that belongs to it"
        )
        problems.append((("inputs",), message))
    only = spec.measure.request
    if only != WHOLE_REQUEST and only not in spec.inputs:
        nearest = suggest_nearest(only, [WHOLE_REQUEST, *spec.inputs])
        message = f"no input is named '{shorten(only)}'; {nearest}"
        problems.append((("measure", "request"), message))
    return problems


def _reads_text_alone(kind: NodeKind) -> bool:
    """Return whether a kind of node has one input, a text."""
    return bool(kind.text_ports) and tuple(kind.inputs) == kind.text_ports


def _name_list_encoders() -> str:
    """Name the kinds of node that can embed a list of texts, each with its article."""
    names: list[str] = []
    for name in NODE_KINDS.list_names():
        kind = get_kind(name)
        if kind.is_model and kind.embedding_output and _reads_text_alone(kind):
            names.append(_add_article(name))
    return " or ".join(names)


def _check_lists(spec: Spec) -> list[Problem]:
    """Check that the query of a list comes from a model that can embed the list too."""
    problems: list[Problem] = []
    for name, node in spec.nodes.items():
        kind = get_kind(node.kind)
        if not kind.embeds_list:
            continue
        [query_port] = kind.embedding_ports
        source = parse_reference(node.inputs[query_port]).node
        if source not in spec.nodes or not _reads_text_alone(get_kind(spec.nodes[source].kind)):
            message = f"must be the embedding of {_name_list_encoders()}: it embeds the list too"
            problems.append((("nodes", name, "inputs", query_port), message))
    return problems


def _check_limits(spec: Spec, unread_names: frozenset[str]) -> list[Problem]:
    models = spec.list_model_nodes()
    problems: list[Problem] = []
    for name in spec.limits.node_ms:
        if name not in models and name not in unread_names:
            message = f"no model is named '{shorten(name)}'; {suggest_nearest(name, models)}"
            problems.append((("limits", "node_ms", name), message))
    return problems


def _check_losses(spec: Spec) -> list[Problem]:
    """Check that every weight is that of a loss which some kind of node has."""
    choices = list_known_losses()
    problems: list[Problem] = []
    for name in spec.distill.losses:
        if name not in choices:
            message = f"no loss is named '{shorten(name)}'; {suggest_nearest(name, choices)}"
            problems.append((("distill", "losses", name), message))
    return problems


def _check_importance(spec: Spec) -> list[Problem]:
    """Check that no criterion by gradient is asked of an embedding that no loss sees."""
    criteria = re.findall(r"\w+", spec.prune.importance)
    by_gradient = [
        c for c in criteria if c in IMPORTANCE and IMPORTANCE.get_fact(c, "takes_gradients")
    ]
    problems: list[Problem] = []
    for name in find_unjoined_encoders(spec) if by_gradient else ():
        message = (
            f"{by_gradient[0]} says nothing of the embedding of '{name}', which no joining node "
            "reads; reconstruction, the default, does (with prune.sensitivity: measured)"
        )
        problems.append((("prune", "importance"), message))
    return problems


def _check_metrics(spec: Spec) -> list[Problem]:
    """Check that every metric finds a node that it can judge."""
    if not spec.metrics:
        choices = ", ".join(METRICS.list_names())
        return [(("metrics",), f"name at least one to judge by (known: {choices})")]
    problems: list[Problem] = []
    for i, metric in enumerate(spec.metrics):
        needs = METRICS.get_fact(metric.kind, "needs")
        nodes = find_judged_nodes(spec, needs)
        if not nodes:
            needed_node = METRICS.get_fact(metric.kind, "judges")
            message = f"metric '{metric.kind}' needs {needed_node}; the spec has none"
            problems.append((("metrics", str(i)), message))
        elif metric.of and metric.of not in nodes:
            nearest = suggest_nearest(metric.of, nodes)
            message = f"'{metric.kind}' can't judge '{shorten(metric.of)}'; {nearest}"
            problems.append((("metrics", str(i), "of"), message))
    return problems
