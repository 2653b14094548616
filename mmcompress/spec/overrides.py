"""TODO."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def split_key(dotted: str) -> tuple[str, ...]:
    """`nodes.vision.prune.blocks.0.ffn` -> its keys; a block's own name keeps its dot."""
    head, marker, block = dotted.partition(".prune.blocks.")
    return (*head.split("."), "prune", "blocks", block) if marker else tuple(dotted.split("."))


def apply_overrides(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain data with values put at dotted paths.

    Raises `ValueError` with the path that leads into something else than a mapping.
    """
    found = copy.deepcopy(dict(data))
    for dotted, value in changes.items():
        at: Any = found
        *keys, last = split_key(dotted)
        for key in keys:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                raise ValueError(f"{dotted}: '{key}' is not a mapping")
        at[last] = value
    return found
