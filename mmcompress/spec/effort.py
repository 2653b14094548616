"""Levels of effort: how much is searched, trained and measured, set by one word.

A level changes the values that a spec has. What is set for itself keeps its value: with `--set`
beside `--effort`, or in the file where the file names the level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmcompress.spec.overrides import apply_overrides, rename_old_key, split_key
from mmcompress.spec.schema import Data, Distill, Measure, Search

SECTIONS = {"data": Data, "search": Search, "distill": Distill, "measure": Measure}
"""The records of the sections, which hold the defaults."""


@dataclass(frozen=True, kw_only=True)
class ValueChange:
    """How a level changes one value."""

    factor: float = 1.0
    """Factor on the value."""
    least: float = 0.0
    """The least value that comes of it, unless the value was smaller before."""
    most: float | None = None
    """The largest value that comes of it; None: there is none."""
    value: Any = None
    """The value itself, where it is the same whatever the spec says."""

    def scale(self, value: float, *, is_whole: bool) -> float:
        """Return a number of the level in place of the one of the spec.

        Args:
            value: The number of the spec.
            is_whole: Whether the key takes whole numbers alone. A file may write 2 for 2.0.
        """
        changed = value * self.factor
        if self.most is not None:
            changed = min(changed, self.most)
        changed = max(changed, min(self.least, value))
        return round(changed) if is_whole else changed


QUICK = {
    "data.sensitivity_pairs": ValueChange(factor=0.5, least=8),
    "search.trials": ValueChange(factor=0.5, least=4),
    "search.level_switches": ValueChange(factor=0.25, least=4),
    "search.linearization_rounds": ValueChange(most=1),
    "search.short_finetunings": ValueChange(most=2),
    "search.max_artifacts": ValueChange(most=1),
    "distill.steps": ValueChange(factor=0.25, least=1),
    "distill.auto_steps_factor": ValueChange(factor=0.25),
    "distill.minutes": ValueChange(factor=0.125, least=0.5),
    "distill.max_passes": ValueChange(factor=2),
    "distill.validations": ValueChange(most=2),
    "measure.max_parts": ValueChange(most=2),
}
"""A first look: whether a target is in reach, and about what it costs."""

BEST = {
    "data.sensitivity_pairs": ValueChange(factor=2),
    "search.trials": ValueChange(factor=2),
    "search.level_switches": ValueChange(factor=2),
    "search.short_finetunings": ValueChange(factor=2, most=10),
    "search.max_artifacts": ValueChange(least=3, most=3),
    "distill.steps": ValueChange(value="auto"),
    "distill.schedule": ValueChange(value="until_converged"),
    "distill.minutes": ValueChange(value=90.0),
}
"""As good as a night of work makes it."""

CHANGES: Mapping[str, Mapping[str, ValueChange]] = {"quick": QUICK, "normal": {}, "best": BEST}
"""What every level changes, by dotted key. `normal` is the spec as it is written."""


def apply_effort(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of a spec with the values of its level of effort.

    Values of the wrong type stay as they are: the check of the schema names them.

    Args:
        data: The spec as plain data, overrides applied.
        overrides: The values that were put in place of those of the file, by dotted key.
    """
    level = data.get("effort", "normal")
    changes = CHANGES.get(level, {}) if isinstance(level, str) else {}
    changed: dict[str, Any] = {}
    for dotted, change in changes.items():
        value = _find_value(data, dotted)
        is_set_in_file = value is not None and "effort" not in overrides
        if is_set_in_file or _is_overridden(dotted, overrides):
            continue
        if value is None:
            value = _find_default(dotted)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if change.value is not None:
            changed[dotted] = change.value
        elif is_number:
            is_whole = not isinstance(_find_default(dotted), float)
            changed[dotted] = change.scale(value, is_whole=is_whole)
    return apply_overrides(data, changed)


def _is_overridden(dotted: str, overrides: Mapping[str, Any]) -> bool:
    """Return whether a key, or a section that it is in, was put in place of the file's."""
    for key, value in overrides.items():
        present_key, _ = rename_old_key(key, value)
        if dotted == present_key:
            return True
        if isinstance(value, Mapping) and dotted.startswith(f"{present_key}."):
            return dotted.removeprefix(f"{present_key}.") in value
    return False


def _find_value(data: Mapping[str, Any], dotted: str) -> Any:
    """Find a value of plain data; None where there is none."""
    value: Any = data
    for key in split_key(dotted):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _find_default(dotted: str) -> Any:
    """Find the default of a value."""
    section, key = dotted.split(".")
    return getattr(SECTIONS[section], key)
