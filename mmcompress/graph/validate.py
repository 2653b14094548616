"""Finds what is wrong with the graph of a spec: names, ports, value types, cycles, and what metrics
and criteria need."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from graphlib import CycleError

from mmcompress.errors import SpecError, shorten, suggest_nearest
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
from mmcompress.spec.schema import Node, Spec

MakeError = Callable[[tuple[str, ...], str], SpecError]
"""Makes the error at a place in the spec: (path of keys, message)."""

Problem = tuple[tuple[str, ...], str]
"""What is wrong: the path of keys to it, and a message."""

UNSAFE_SIGNS = ("/", "\\", "\0")
"""What the name of a pipeline may not hold: it is a part of the names of folders."""

RESERVED_NODE_NAMES = ("units",)
"""Names that no node may have: a file of that name lies beside the weights of each node."""

COMMON_OPTIONS = ("kind", "inputs", "precision", "prune")
"""Keys that every node of a spec has."""


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
        graph_problems += _check_options(spec, name)
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


def _check_options(spec: Spec, name: str) -> list[Problem]:
    """Check the keys of a node against those that its kind has."""
    node = spec.nodes[name]
    kind = get_kind(node.kind)
    problems: list[Problem] = []
    if kind.is_model and not node.source:
        sources = "embedded:, open_clip:, transformers:, pip:, python: or a folder"
        message = f"'source' is missing: a model needs weights ({sources})"
        problems.append((("nodes", name), message))
    for option in fields(Node):
        if option.name in COMMON_OPTIONS or option.name in kind.options:
            continue
        if getattr(node, option.name) != option.default:
            owners = _list_kinds_with_option(option.name)
            message = f"a {node.kind} has no {option.name}, only {' and '.join(owners)}"
            problems.append((("nodes", name, option.name), message))
    return problems


def _list_kinds_with_option(option: str) -> list[str]:
    """Return the kinds of node that have an option."""
    return [name for name in NODE_KINDS.names() if option in get_kind(name).options]


def _check_ports(spec: Spec, name: str, *, unread_names: frozenset[str]) -> list[Problem]:
    """Check that every port of a node is connected to a value that it accepts."""
    node = spec.nodes[name]
    kind = get_kind(node.kind)
    problems: list[Problem] = []
    for port, expected in kind.inputs.items():
        if port not in node.inputs and not expected.optional:
            message = f"the port '{port}' of a {node.kind} is not connected"
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
        return f"a {kind_name} has no port '{shorten(port)}'; {suggest_nearest(port, kind.inputs)}"
    value_type = find_value_type(spec, reference)
    if value_type is None:
        nearest = suggest_nearest(reference, _list_values(spec))
        return f"nothing is named '{shorten(reference)}'; {nearest}"
    accepted = kind.inputs[port].types
    if value_type in accepted:
        return ""
    fitting = [value for value in _list_values(spec) if find_value_type(spec, value) in accepted]
    return (
        f"'{reference}' is {_with_article(value_type)}, the port takes "
        f"{_with_article(' or '.join(accepted))} (these fit: {', '.join(fitting) or 'none'})"
    )


def _with_article(value_type: str) -> str:
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
        message = f"name at least one value that the pipeline gives {values}"
        problems.append((("outputs",), message))
    for name, reference in spec.outputs.items():
        if parse_reference(reference).node in unread_names:
            continue
        if find_value_type(spec, reference) is None:
            nearest = suggest_nearest(reference, _list_values(spec))
            problems.append(
                (("outputs", name), f"nothing is named '{shorten(reference)}'; {nearest}")
            )
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
    if not spec.model_nodes():
        problems.append((("nodes",), "no node is a model: there is nothing to compress"))
    if len(spec.inputs) != 1:
        message = "a pipeline takes exactly one input, an image, audio or a text"
        problems.append((("inputs",), message))
    return problems


def _reads_text_alone(kind: NodeKind) -> bool:
    """Return whether a kind of node has one input, a text."""
    return bool(kind.text_ports) and tuple(kind.inputs) == kind.text_ports


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
            message = "must be the embedding of a text_encoder: it embeds the list too"
            problems.append((("nodes", name, "inputs", query_port), message))
    return problems


def _check_limits(spec: Spec, unread_names: frozenset[str]) -> list[Problem]:
    models = spec.model_nodes()
    problems: list[Problem] = []
    for name in spec.limits.node_ms:
        if name not in models and name not in unread_names:
            message = f"no model is named '{shorten(name)}'; {suggest_nearest(name, models)}"
            problems.append((("limits", "node_ms", name), message))
    return problems


def _check_losses(spec: Spec) -> list[Problem]:
    """Check that every weight is that of a loss which some kind of node has."""
    known = list_known_losses()
    problems: list[Problem] = []
    for name in spec.distill.losses:
        if name not in known:
            message = f"no loss is named '{shorten(name)}'; {suggest_nearest(name, known)}"
            problems.append((("distill", "losses", name), message))
    return problems


def _check_importance(spec: Spec) -> list[Problem]:
    """Check that no criterion by gradient is asked of an embedding that no loss sees."""
    criteria = re.findall(r"\w+", spec.prune.importance)
    by_gradient = [
        c for c in criteria if c in IMPORTANCE.names() and IMPORTANCE.fact(c, "takes_gradients")
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
        known = ", ".join(METRICS.names())
        return [(("metrics",), f"name at least one to judge by (known: {known})")]
    problems: list[Problem] = []
    for i, metric in enumerate(spec.metrics):
        needs = METRICS.fact(metric.kind, "needs")
        nodes = find_judged_nodes(spec, needs)
        if not nodes:
            needed_node = METRICS.fact(metric.kind, "judges")
            message = f"metric '{metric.kind}' needs {needed_node}; the spec has none"
            problems.append((("metrics", str(i)), message))
        elif metric.of and metric.of not in nodes:
            nearest = suggest_nearest(metric.of, nodes)
            message = f"'{metric.kind}' can't judge '{shorten(metric.of)}'; {nearest}"
            problems.append((("metrics", str(i), "of"), message))
    return problems
