"""Reads a YAML file as plain data that knows the line of every key, so that an error can name
it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mmcompress.errors import DataError, SpecError, shorten
from mmcompress.spec.overrides import (
    SHORT_FORMS,
    apply_overrides,
    rename_old_key,
    rename_old_keys,
    split_key,
)
from mmcompress.spec.pipeline_templates import describe_shipped_pipeline
from mmcompress.storage import InvalidValue, build_record, read_text_file

RecordType = TypeVar("RecordType")

KeyPath = tuple[str, ...]
"""Keys from the root of a file to a value."""


MERGE_TAG = "tag:yaml.org,2002:merge"
"""YAML's own tag of a plain `<<`: the keys of other mappings are taken over."""

MAX_VALUES = 100_000
"""Values of one file, those behind anchors counted each time that they are used. A few lines of
anchors in anchors could otherwise fill the memory."""


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
        self._open_nodes: list[yaml.Node] = []
        """The mappings and lists around the value that is being read."""
        self._value_count = 0
        """Values that were read so far."""
        self.data: dict[str, Any] = self._read_mapping(self._parse())
        rename_old_keys(self.data, self.lines)
        for dotted_key, value in (overrides or {}).items():
            self._override(*rename_old_key(dotted_key, value))

    def _parse(self) -> yaml.MappingNode:
        """Parse the file into nodes that know their lines."""
        try:
            text = read_text_file(self.path)
        except DataError as error:
            hint = "" if self.path.exists() else describe_shipped_pipeline(self.path)
            raise SpecError(f"{error}{hint}") from error
        try:
            root = yaml.compose(text, Loader=SpecYaml)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{self.path}:{mark.line + 1}" if mark else str(self.path)
            reason = getattr(error, "problem", error)
            raise SpecError(f"{place}: not valid YAML: {reason}") from error
        except RecursionError as error:
            raise SpecError(f"{self.path}: nested too deeply") from error
        if root is None:
            raise SpecError(f"{self.path}: the file is empty")
        if not isinstance(root, yaml.MappingNode):
            raise SpecError(f"{self.path}: expected a mapping at the top")
        return root

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath = ()) -> dict[str, Any]:
        """Return a mapping as plain data, and note the line of every key.

        Its own keys stand before those that `<<` takes over, as YAML 1.1 says of merge keys.
        """
        mapping: dict[str, Any] = {}
        merged_mappings: list[dict[str, Any]] = []
        merged_lines: list[dict[KeyPath, int]] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == MERGE_TAG:
                for merged_node in self._list_merged_nodes(value_node, line):
                    lines_before = self.lines
                    self.lines = {}
                    merged_mappings.append(self._read_value(merged_node, path))
                    merged_lines.append(self.lines)
                    self.lines = lines_before
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise SpecError(
                    f"{self.path}:{line}: a key must be a text, not a list or a mapping"
                )
            key = str(key_node.value)
            if key in mapping:
                raise SpecError(f"{self.path}:{line}: '{shorten(key)}' stands twice in one mapping")
            mapping[key] = self._read_value(value_node, (*path, key))
            self.lines[(*path, key)] = line
        depth = len(path)
        for merged, lines in zip(merged_mappings, merged_lines, strict=True):
            new_keys = merged.keys() - mapping.keys()
            for key_path, line in lines.items():
                if len(key_path) > depth and key_path[depth] in new_keys:
                    self.lines[key_path] = line
            mapping = {**merged, **mapping}
        return mapping

    def _list_merged_nodes(self, node: yaml.Node, line: int) -> list[yaml.MappingNode]:
        """Return the mappings that `<<` names; of equal keys in several, the first one counts."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for merged_node in nodes:
            if not isinstance(merged_node, yaml.MappingNode):
                raise SpecError(f"{self.path}:{line}: '<<' takes a mapping, or a list of mappings")
        return list(nodes)

    def _read_value(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return a value as plain data, environment variables filled in."""
        line = node.start_mark.line + 1
        self.lines[path] = line
        self._value_count += 1
        if self._value_count > MAX_VALUES:
            raise SpecError(f"{self.path}:{line}: more than {MAX_VALUES:,} values")
        if any(node is open_node for open_node in self._open_nodes):
            raise SpecError(f"{self.path}:{line}: an anchor stands inside itself")
        if isinstance(node, yaml.ScalarNode):
            return self._read_scalar(node, path)
        self._open_nodes.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._read_mapping(node, path)
            return [self._read_value(item, (*path, str(i))) for i, item in enumerate(node.value)]
        finally:
            self._open_nodes.pop()

    def _read_scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        """Return a text, a number, a truth value or None, environment variables filled in."""
        try:
            value = SpecYaml("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            # a date of month 13, or a text with the tag of a number
            reason = getattr(error, "problem", None) or error
            place = f"{self.path}:{node.start_mark.line + 1}"
            raise SpecError(f"{place}: {shorten(node.value)}: {reason}") from error
        return self._fill_in_environment(value, path) if isinstance(value, str) else value

    def _fill_in_environment(self, text: str, path: KeyPath) -> str:
        """Replace `${NAME}` and `${NAME:-default}` in a text."""

        def look_up(match: re.Match[str]) -> str:
            name = match.group(1)
            value = os.environ.get(name, match.group(3))
            if value is None:
                raise self.make_error(path, f"the environment variable {name} is not set")
            return str(value)

        return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", look_up, text)

    def _override(self, dotted_key: str, value: Any) -> None:
        """Put a value at a dotted key; its line is 0, which stands for `--set`."""
        try:
            self.data = apply_overrides(self.data, {dotted_key: value})
        except ValueError as error:
            raise SpecError(f"{self.path}: --set {error}") from error
        keys = split_key(dotted_key)
        self.lines = {path: line for path, line in self.lines.items() if path[: len(keys)] != keys}
        self._mark_as_set(keys, value)

    def _mark_as_set(self, path: KeyPath, value: Any) -> None:
        """Note that a value and all in it come from `--set`."""
        self.lines[path] = 0
        if isinstance(value, dict):
            for key, inner in value.items():
                self._mark_as_set((*path, str(key)), inner)

    def make_error(self, path: KeyPath, message: str) -> SpecError:
        """Return the error at the nearest known line of a path."""
        description = f"{_join_keys(path)}: " if path else ""
        return SpecError(f"{self.describe_place(path)}: {description}{message}")

    def describe_place(self, path: KeyPath) -> str:
        """Return file and line of the nearest known key of a path; the option for an override."""
        inner = [known for known, line in self.lines.items() if known[: len(path)] == path]
        if path and path not in self.lines and inner and not self.lines[inner[0]]:
            # A section that `--set` alone has made, such as one whose name is misspelled.
            return f"{self.path} ({_name_option(inner[0])})"
        nearest = path
        while nearest and nearest not in self.lines:
            nearest = nearest[:-1]
        line = self.lines.get(nearest, 1)
        return f"{self.path}:{line}" if line else f"{self.path} ({_name_option(nearest)})"

    def build(self, record_type: type[RecordType]) -> RecordType:
        """Make a record of the file.

        Raises:
            SpecError: Values don't fit; one line for each problem, with its place.
        """
        try:
            return build_record(record_type, self.data)
        except InvalidValue as invalid:
            lines = [str(self.make_error(p.path, p.message)) for p in invalid.problems]
            raise SpecError("\n".join(lines)) from None


def _name_option(path: KeyPath) -> str:
    """Return the options that set a key."""
    key = _join_keys(path)
    for option, short_key in SHORT_FORMS.items():
        if short_key == key:
            return f"--{option.replace('_', '-')} or --set {key}"
    return f"--set {key}"


def _join_keys(path: KeyPath) -> str:
    """Return keys as one dotted text for a message; long ones are cut."""
    return ".".join(shorten(key) for key in path)


def list_given_keys(path: str | Path, overrides: dict[str, Any] | None = None) -> frozenset[str]:
    """Return the dotted keys that a spec or its overrides set: they are not searched.

    `precision: auto` leaves the precision to the search, so it does not count as set.
    """
    source = YamlSource(path, overrides)
    given_keys: set[str] = set()
    for keys in source.lines:
        value = _find_value(source.data, keys)
        if value != "auto" and not isinstance(value, dict):
            given_keys.add(".".join(keys))
    return frozenset(given_keys)


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
