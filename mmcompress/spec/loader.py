"""Reads a YAML file as plain data that knows the line of every key, so that an error can name
it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mmcompress.errors import SpecError
from mmcompress.spec.overrides import (
    apply_overrides,
    rename_old_key,
    rename_old_keys,
    split_key,
)
from mmcompress.storage import InvalidValue, build_record

RecordType = TypeVar("RecordType")

KeyPath = tuple[str, ...]
"""Keys from the root of a file to a value."""


class SpecYaml(yaml.SafeLoader):
    """YAML that takes 1e-4 for a number, as everybody does but YAML 1.1."""


SpecYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


class YamlSource:
    """The plain data of a YAML file, with the line of every key in it."""

    def __init__(self, path: str | Path, overrides: dict[str, Any] | None = None):
        """Read a file.

        Args:
            path: The file.
            overrides: Values by dotted key that take the place of what the file says.

        Raises:
            SpecError: The file can't be read, is not YAML, names a key twice or an unknown
                environment variable.
        """
        self.path = Path(path)
        self.lines: dict[KeyPath, int] = {}
        self.data: dict[str, Any] = self._read_mapping(self._parse())
        rename_old_keys(self.data, self.lines)
        for dotted, value in (overrides or {}).items():
            self._override(*rename_old_key(dotted, value))

    def _parse(self) -> yaml.MappingNode:
        """Parse the file into nodes that know their lines."""
        try:
            text = self.path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SpecError(f"{self.path}: can't be read: {reason}") from error
        try:
            root = yaml.compose(text, Loader=SpecYaml)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{self.path}:{mark.line + 1}" if mark else str(self.path)
            reason = getattr(error, "problem", error)
            raise SpecError(f"{place}: not valid YAML: {reason}") from error
        if root is None:
            raise SpecError(f"{self.path}: the file is empty")
        if not isinstance(root, yaml.MappingNode):
            raise SpecError(f"{self.path}: expected a mapping at the top")
        return root

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath = ()) -> dict[str, Any]:
        """Return a mapping as plain data, and note the line of every key."""
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in mapping:
                raise SpecError(f"{self.path}:{line}: '{key}' stands twice in one mapping")
            mapping[key] = self._read_value(value_node, (*path, key))
            self.lines[(*path, key)] = line
        return mapping

    def _read_value(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return a value as plain data, environment variables filled in."""
        line = node.start_mark.line + 1
        self.lines[path] = line
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._read_value(item, (*path, str(i))) for i, item in enumerate(node.value)]
        try:
            value = SpecYaml("").construct_object(node, deep=True)
        except yaml.YAMLError as error:
            raise SpecError(f"{self.path}:{line}: {getattr(error, 'problem', error)}") from error
        return self._fill_in_environment(value, path) if isinstance(value, str) else value

    def _fill_in_environment(self, text: str, path: KeyPath) -> str:
        """Replace `${NAME}` and `${NAME:-default}` in a text."""

        def look_up(match: re.Match[str]) -> str:
            name = match.group(1)
            value = os.environ.get(name, match.group(3))
            if value is None:
                raise self.error(path, f"the environment variable {name} is not set")
            return str(value)

        return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", look_up, text)

    def _override(self, dotted: str, value: Any) -> None:
        """Put a value at a dotted key; its line is 0, which stands for `--set`."""
        try:
            self.data = apply_overrides(self.data, {dotted: value})
        except ValueError as error:
            raise SpecError(f"{self.path}: --set {error}") from error
        keys = split_key(dotted)
        self.lines = {path: line for path, line in self.lines.items() if path[: len(keys)] != keys}
        self._mark_as_set(keys, value)

    def _mark_as_set(self, path: KeyPath, value: Any) -> None:
        """Note that a value and all in it come from `--set`."""
        self.lines[path] = 0
        if isinstance(value, dict):
            for key, inner in value.items():
                self._mark_as_set((*path, str(key)), inner)

    def error(self, path: KeyPath, message: str) -> SpecError:
        """Return the error at the nearest known line of a path."""
        nearest = path
        while nearest and nearest not in self.lines:
            nearest = nearest[:-1]
        line = self.lines.get(nearest, 1)
        place = f"{self.path}:{line}" if line else f"{self.path} (--set {'.'.join(nearest)})"
        what = f"{'.'.join(path)}: " if path else ""
        return SpecError(f"{place}: {what}{message}")

    def build(self, record_type: type[RecordType]) -> RecordType:
        """Make a record of the file.

        Raises:
            SpecError: Values don't fit; one line for each problem, with its place.
        """
        try:
            return build_record(record_type, self.data)
        except InvalidValue as invalid:
            lines = [str(self.error(p.path, p.message)) for p in invalid.problems]
            raise SpecError("\n".join(lines)) from None


def list_given_keys(path: str | Path, overrides: dict[str, Any] | None = None) -> frozenset[str]:
    """Return the dotted keys that a spec or its overrides set: they are not searched.

    `precision: auto` leaves the precision to the search, so it does not count as set.
    """
    source = YamlSource(path, overrides)
    given: set[str] = set()
    for keys in source.lines:
        value = _find_value(source.data, keys)
        if value != "auto" and not isinstance(value, dict):
            given.add(".".join(keys))
    return frozenset(given)


def _find_value(data: Any, keys: KeyPath) -> Any:
    """Return the value that keys lead to, None when they lead nowhere."""
    value = data
    for key in keys:
        if isinstance(value, list):
            value = value[int(key)]
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value
