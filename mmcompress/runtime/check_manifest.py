"""What `manifest.json` may say: the form and the bounds of each key, and the wiring."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmcompress.registry import INPUT_TYPES, NODE_KINDS, PROVIDERS
from mmcompress.runtime.check_values import (
    Rules,
    check_flag,
    check_mapping,
    check_text,
    list_problems,
    require_list,
    require_whole_number,
    show_value,
)

MAX_THREADS = 256
"""Threads of a session: more only wait for each other."""

MAX_BATCH = 4096
"""Requests that are answered together."""

MAX_NODES = 1_000
"""Nodes of a pipeline: each may have a thread of its own."""

MAX_FILES = 10_000
"""Files of a bundle, and graphs of a node."""

Manifest = dict[str, Any]
"""The content of `manifest.json`."""


def _check_names(value: object) -> str:
    """Check a mapping from names to texts."""
    if not isinstance(value, dict) or len(value) > MAX_FILES:
        return check_mapping(value) or f"more than {MAX_FILES} entries"
    return next((check_text(text) for text in value.values() if not isinstance(text, str)), "")


def _check_input_types(value: object) -> str:
    """Check the inputs of a pipeline."""
    for name, value_type in _iterate_mapping(value):
        if value_type not in INPUT_TYPES:
            return f"'{name}' is of the unknown type {show_value(value_type)}"
    return _check_names(value)


def _check_hash(value: object) -> str:
    """Check a SHA-256 in hexadecimal digits."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return ""
    return f"expected a SHA-256 of 64 hexadecimal digits, got {show_value(value)}"


def _check_provider(value: object) -> str:
    """Check the name of a provider."""
    if not isinstance(value, str):
        return f"expected the name of a provider, got {show_value(value)}"
    return PROVIDERS.find_problem(value) or ""


TEXT_TYPE = "text"
"""The type of inputs that are given as they are, and not as files."""

ROOT_RULES: Rules = {
    "name": check_text,
    "threads": require_whole_number(1, MAX_THREADS),
    "batch": require_whole_number(1, MAX_BATCH),
    "parallel": check_flag,
    "provider": _check_provider,
    "graph": {
        "inputs": _check_input_types,
        "outputs": _check_names,
        "nodes": check_mapping,
    },
    "files": check_mapping,
}
"""Keys of the manifest."""

NODE_RULES: Rules = {
    "kind": check_text,
    "inputs": _check_names,
    "files": _check_names,
    "config": check_mapping,
    "precision": check_text,
    "spared": require_list(check_text, max_length=MAX_FILES),
    "cpu_flags": require_list(check_text, max_length=MAX_FILES),
    "params": require_whole_number(0, 10**15),
    "structure": check_mapping,
}
"""Keys of a node."""

FILE_RULES: Rules = {"sha256": _check_hash, "bytes": require_whole_number(0, 2**53)}
"""Keys of a file."""

REQUIRED_KEYS = {
    "": ("format", "graph", "files"),
    "graph": ("inputs", "outputs", "nodes"),
}
"""Keys that have to be there, by the path of their mapping."""


def list_form_problems(manifest: object) -> Iterator[str]:
    """List what is wrong with the form of a manifest, each with its key.

    The wiring, and what kinds of node ask of their configuration, are checked when the bundle is
    loaded. A kind may be that of a plug-in.
    """
    if not isinstance(manifest, dict):
        yield check_mapping(manifest)
        return
    yield from _list_missing(manifest, "")
    yield from list_problems(manifest, ROOT_RULES)
    graph = manifest.get("graph")
    if isinstance(graph, dict):
        yield from _list_missing(graph, "graph")
        yield from _list_entry_problems(graph.get("nodes"), "graph.nodes", rules=NODE_RULES)
    for name, _ in _iterate_mapping(manifest.get("files")):
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            yield f"files: the file name {show_value(name)} leaves the bundle"
    yield from _list_entry_problems(manifest.get("files"), "files", rules=FILE_RULES)
    for name, entry in _iterate_mapping(manifest.get("files")):
        if isinstance(entry, dict) and "sha256" not in entry:
            yield f"files.{name}: 'sha256' is missing"


def _list_missing(mapping: Manifest, key: str) -> Iterator[str]:
    """List the keys that the mapping at a path lacks."""
    for name in REQUIRED_KEYS[key]:
        if name not in mapping:
            yield f"{key or 'the root'}: '{name}' is missing"


def _list_entry_problems(entries: object, key: str, *, rules: Rules) -> Iterator[str]:
    """List what is wrong with each entry of a mapping."""
    for name, entry in _iterate_mapping(entries):
        yield from list_problems(entry, rules, key=f"{key}.{name}")


def _iterate_mapping(mapping: object) -> Iterator[tuple[str, object]]:
    """Yield the entries of a mapping; nothing where it is none."""
    if isinstance(mapping, dict):
        yield from mapping.items()


def list_wiring_problems(manifest: Manifest) -> Iterator[str]:
    """List what is wrong with the graph of a manifest whose form is right, each with its key.

    Every node is of a known kind and has the ports of it. Every reference leads to a value of the
    right type. No node waits for itself.
    """
    graph = manifest["graph"]
    nodes = graph["nodes"]
    for key in ("inputs", "outputs", "nodes"):
        if not graph[key]:
            yield f"graph.{key}: there are none"
    if len(nodes) > MAX_NODES:
        yield f"graph.nodes: more than {MAX_NODES}"
    types = dict(graph["inputs"])
    for name, node in nodes.items():
        key = f"graph.nodes.{name}"
        if "." in name or name in graph["inputs"]:
            yield f"{key}: not a name of a node, or that of an input"
        if node.get("kind") not in NODE_KINDS:
            yield f"{key}.kind: this runtime doesn't know {show_value(node.get('kind'))}"
            continue
        kind = NODE_KINDS.get(node["kind"])
        types |= {f"{name}.{port}": value_type for port, value_type in kind.outputs.items()}
        if kind.ending_output:
            types[f"{name}.{kind.ending_output}"] = "endings"
    for name, node in nodes.items():
        if node.get("kind") in NODE_KINDS:
            yield from _list_port_problems(f"graph.nodes.{name}", node, types=types)
    for name, reference in graph["outputs"].items():
        if reference not in types:
            yield f"graph.outputs.{name}: nothing gives {show_value(reference)}"
    yield from _list_cycles(nodes)


def _list_port_problems(key: str, node: Manifest, *, types: Mapping[str, str]) -> Iterator[str]:
    """List what is wrong with the ports of one node.

    Args:
        key: The path of the node.
        node: The node; its kind is known.
        types: Value types by reference.
    """
    ports = NODE_KINDS.get(node["kind"]).inputs
    wired = node.get("inputs", {})
    for port, reference in wired.items():
        if port not in ports:
            yield f"{key}.inputs: '{node['kind']}' has no port '{port}'"
        elif reference not in types:
            yield f"{key}.inputs.{port}: nothing gives {show_value(reference)}"
        elif types[reference] not in ports[port].types:
            wanted = " or ".join(ports[port].types)
            yield f"{key}.inputs.{port}: {reference} is of type {types[reference]}, not {wanted}"
    for port, wanted_port in ports.items():
        if port not in wired and not wanted_port.optional:
            yield f"{key}.inputs: the port '{port}' is missing"


def sort_nodes(nodes: Manifest) -> list[str]:
    """Sort the names of nodes so that each comes after those that it reads.

    Those that wait for themselves are left out.
    """
    sources_by_node = {name: _list_sources(node) & set(nodes) for name, node in nodes.items()}
    order: list[str] = []
    while True:
        ready_nodes = [name for name, sources in sources_by_node.items() if sources <= set(order)]
        if not ready_nodes:
            return order
        order += ready_nodes
        for name in ready_nodes:
            del sources_by_node[name]


def _list_cycles(nodes: Manifest) -> Iterator[str]:
    """List the nodes that wait for themselves."""
    for name in set(nodes) - set(sort_nodes(nodes)):
        yield f"graph.nodes.{name}.inputs: the node waits for itself"


def _list_sources(node: Manifest) -> set[str]:
    """List the nodes and inputs that a node reads."""
    return {reference.partition(".")[0] for reference in node.get("inputs", {}).values()}
