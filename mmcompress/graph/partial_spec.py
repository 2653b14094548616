"""Makes a spec of the values that fit their schema, so that its graph is checked although other
values are wrong."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from mmcompress.spec.loader import KeyPath, YamlSource
from mmcompress.spec.schema import Spec
from mmcompress.storage import InvalidValue, build_record

NAMED_SECTIONS = ("nodes", "inputs")
"""Sections whose entries others refer to by name."""

STAND_INS: dict[str, Any] = {
    "name": "unnamed",
    "outputs": {},
    "data": {"kind": "drawn", "options": {"modality": "text"}},
}
"""Values in place of required ones that are missing or wrong. No check of a graph looks at them."""


@dataclass(frozen=True, kw_only=True)
class PartialSpec:
    """What could be read of a spec."""

    spec: Spec | None
    """The spec; what did not fit has its default. None: too much is wrong."""
    problems: tuple[tuple[KeyPath, str], ...]
    """What did not fit: the path of keys to it, and a message."""
    unread_names: frozenset[str] = frozenset()
    """Nodes and inputs that are left out. References to them are not wrong."""
    has_all_metrics: bool = True
    """Whether its metrics could be read."""


def read_partial_spec(source: YamlSource) -> PartialSpec:
    """Make a spec of what fits in a file, and list what does not."""
    try:
        return PartialSpec(spec=build_record(Spec, source.data), problems=())
    except InvalidValue as invalid:
        problems = tuple((problem.path, problem.message) for problem in invalid.problems)
    data = copy.deepcopy(source.data)
    unread_names: set[str] = set()
    for path, _ in problems:
        _leave_out(data, path)
        if len(path) > 1 and path[0] in NAMED_SECTIONS and path[1] not in data.get(path[0], {}):
            unread_names.add(path[1])
    for key, value in STAND_INS.items():
        data.setdefault(key, value)
    has_all_metrics = not any(path[:1] == ("metrics",) for path, _ in problems)
    try:
        spec = build_record(Spec, data)
    except InvalidValue:
        return PartialSpec(spec=None, problems=problems)
    return PartialSpec(
        spec=spec,
        problems=problems,
        unread_names=frozenset(unread_names),
        has_all_metrics=has_all_metrics,
    )


def _leave_out(data: dict[str, Any], path: KeyPath) -> None:
    """Remove the value at a path, in place; of a node without a kind or inputs, the whole node."""
    section = path[0] if path else ""
    if section in NAMED_SECTIONS and len(path) > 1:
        is_needed = section == "inputs" or len(path) == 2 or path[2] in ("kind", "inputs")
        _remove(data, path[:2] if is_needed else path)
    elif section == "data" and (len(path) == 1 or path[1] == "kind"):
        _remove(data, path[:1])
    elif section in ("metrics", "plugins"):
        # an entry of a list can't be left out without moving the others
        _remove(data, path[:1])
    else:
        _remove(data, path)


def _remove(data: dict[str, Any], path: KeyPath) -> None:
    """Remove the key at the end of a path, in place; nothing when the path leads nowhere."""
    if not path:
        return
    container: Any = data
    for key in path[:-1]:
        container = container.get(key) if isinstance(container, dict) else None
    if isinstance(container, dict):
        container.pop(path[-1], None)
