"""Changes to a spec at dotted keys, and the old names of keys, which are read for one release."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmcompress.spec.schema import Spec

OLD_KEYS = {
    "data.damage": "data.sensitivity_pairs",
    "data.choosing": "data.validation_pairs",
    "data.finals": "data.final_pairs_factor",
    "prune.damage": "prune.sensitivity",
    "quantize.sensitive": "quantize.max_loss_increase",
    "distill.rate": "distill.learning_rate",
    "distill.gentle": "distill.find_learning_rate",
    "distill.checks": "distill.validations",
    "distill.pairs": "distill.distinct_pairs",
    "distill.precision": "compute.precision",
    "distill.embedding": "distill.losses.embedding",
    "distill.tokens": "distill.losses.tokens",
    "distill.affinity": "distill.losses.affinity",
    "distill.contrast": "distill.losses.contrast",
    "distill.caption": "distill.losses.caption",
    "distill.logits": "distill.losses.logits",
    "distill.hidden": "distill.losses.hidden",
    "distill.cross": "distill.losses.cross",
    "search.mutations": "search.level_switches",
    "search.relinearize": "search.linearization_rounds",
    "search.judge": "search.evaluator",
    "search.tryouts": "search.short_finetunings",
    "search.rounds": "search.max_artifacts",
    "measure.device": "measure.readings",
    "measure.rounds": "measure.requests",
}
"""Keys of version 0.1 and what they are called now. A spec that has one is read, with a warning."""

SHORT_FORMS = {
    "target": "target",
    "effort": "effort",
    "trials": "search.trials",
    "workers": "search.workers",
    "ray_address": "search.ray_address",
    "device": "measure.readings",
    "deterministic": "search.deterministic",
    "seed": "seed",
}
"""Options of commands that stand for a key of the spec, without their dashes."""

OLD_VALUES = {("data.labels", "dense"): "teacher"}
"""Values of version 0.1, by key, and what they are called now."""


def split_key(dotted_key: str) -> tuple[str, ...]:
    """Split `nodes.vision.prune.blocks.0.ffn` into its keys; the name of a block keeps its dot."""
    head, marker, block = dotted_key.partition(".prune.blocks.")
    if marker:
        return (*head.split("."), "prune", "blocks", block)
    return tuple(dotted_key.split("."))


def apply_overrides(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of plain data with values put at dotted keys.

    Args:
        data: A spec as plain data.
        changes: New values by dotted key, under their present names.

    Raises:
        ValueError: A key leads into something that is not a mapping.
    """
    changed_data = copy.deepcopy(dict(data))
    for dotted_key, value in changes.items():
        *parents, last = split_key(dotted_key)
        section: Any = changed_data
        for key in parents:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ValueError(f"{dotted_key}: '{key}' is not a mapping")
        section[last] = value
    return changed_data


def override_spec(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """Return a spec with values put at dotted keys; the values are not checked.

    A search asks for thousands of specs. To check each of them would take most of its time.

    Args:
        spec: The spec.
        changes: New values by dotted key, each valid there: a search space is checked when it is
            read.
    """
    nested_changes: dict[str, Any] = {}
    for dotted_key, value in changes.items():
        *parents, last = split_key(dotted_key)
        section = nested_changes
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    changed_data: Spec = _replace_values(spec, nested_changes)
    return changed_data


def _replace_values(record: Any, changes: Mapping[str, Any]) -> Any:
    """Return a record or a mapping with values replaced, those of inner records by their keys."""
    values: dict[str, Any] = {}
    for key, change in changes.items():
        old_value = record.get(key) if isinstance(record, Mapping) else getattr(record, key)
        is_section = isinstance(change, Mapping)
        values[key] = _replace_values(old_value, change) if is_section else change
    return {**record, **values} if isinstance(record, Mapping) else replace(record, **values)


def rename_old_key(dotted_key: str, value: Any) -> tuple[str, Any]:
    """Return a key and its value under their present names, with a warning when one was an old
    name.

    Args:
        dotted_key: A key such as `distill.rate`, or a whole section such as `distill`.
        value: Its value. When it is a section, the keys in it are renamed too.
    """
    if isinstance(value, dict):
        section = {dotted_key: dict(value)}
        rename_old_keys(section, {})
        return dotted_key, section[dotted_key]
    if dotted_key in OLD_KEYS:
        warn_of_old_name(dotted_key, OLD_KEYS[dotted_key])
        dotted_key = OLD_KEYS[dotted_key]
    renamed = OLD_VALUES.get((dotted_key, value)) if isinstance(value, str) else None
    if renamed is not None:
        warn_of_old_name(f"{dotted_key}: {value}", f"{dotted_key}: {renamed}")
        value = renamed
    return dotted_key, value


def warn_of_old_name(old_name: str, new_name: str) -> None:
    """Warn that a name is read for the last time."""
    message = f"'{old_name}' is called '{new_name}' now; the old name is read in this release only"
    warnings.warn(message, FutureWarning, stacklevel=2)


def rename_old_keys(data: dict[str, Any], lines: dict[tuple[str, ...], int]) -> None:
    """Give the old keys of a spec their present names, in place.

    Args:
        data: The spec as plain data.
        lines: The line of every key of it; it follows the names.
    """
    for dotted_key in (*OLD_KEYS, *(key for key, _ in OLD_VALUES)):
        section_name, key = dotted_key.split(".")
        section = data.get(section_name)
        if not isinstance(section, dict) or key not in section:
            continue
        new_dotted, value = rename_old_key(dotted_key, section[key])
        *_, new_key = new_path = tuple(new_dotted.split("."))
        new_section = _open_section(data, new_path[:-1])
        if new_section is None or (new_key in new_section and new_dotted != dotted_key):
            continue  # both names are given: the old one is reported as unknown
        del section[key]
        new_section[new_key] = value
        for path in [path for path in lines if path[:2] == (section_name, key)]:
            lines[(*new_path, *path[2:])] = lines.pop(path)


def _open_section(data: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the mapping at a path, made where it is missing; None where something else is."""
    section = data
    for key in path:
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            return None
        section = inner
    return section
