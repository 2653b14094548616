"""YAML file -> `Spec` or `Space`; an error names file, line, value, choices and the nearest name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mmcompress.errors import SpecError
from mmcompress.spec.overrides import apply_overrides, split_key
from mmcompress.storage import InvalidValue, build_record

T = TypeVar("T")


Lines = dict[tuple[str, ...], int]


class SpecYaml(yaml.SafeLoader):
    """Takes 1e-4 for a number, as everybody does but YAML 1.1."""


SpecYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class YamlSource:
    """Plain data of a YAML file with the line of every path in it."""

    def __init__(self, path: str | Path, overrides: dict[str, Any] | None = None):
        self.path = Path(path)
        try:
            text = self.path.read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise SpecError(f"{path}: can't be read: {getattr(e, 'strerror', None) or e}") from e
        self.lines: Lines = {}
        try:
            root = yaml.compose(text, Loader=SpecYaml)
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise SpecError(f"{where}: not valid YAML: {getattr(e, 'problem', e)}") from e
        if not isinstance(root, yaml.MappingNode):
            raise SpecError(
                f"{path}: {'the file is empty' if root is None else 'expected a mapping at the top'}"
            )
        self.data = self._plain(root, ())
        for dotted, value in (overrides or {}).items():
            self._override(dotted, value)

    def _plain(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            out: dict[str, Any] = {}
            for key, value in node.value:
                name = str(key.value)
                if name in out:
                    raise SpecError(
                        f"{self.path}:{key.start_mark.line + 1}: '{name}' stands twice in one mapping"
                    )
                out[name] = self._plain(value, (*path, name))
                self.lines[(*path, name)] = key.start_mark.line + 1
            return out
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(v, (*path, str(i))) for i, v in enumerate(node.value)]
        try:
            value = SpecYaml("").construct_object(node, deep=True)
        except yaml.YAMLError as e:
            raise SpecError(
                f"{self.path}:{node.start_mark.line + 1}: {getattr(e, 'problem', e)}"
            ) from e
        return self._environment(value, path) if isinstance(value, str) else value

    def _environment(self, text: str, path: tuple[str, ...]) -> str:
        def lookup(m: re.Match[str]) -> str:
            name, default = m.group(1), m.group(3)
            value = os.environ.get(name, default)
            if value is None:
                raise self.error(path, f"the environment variable {name} is not set")
            return value

        return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", lookup, text)

    def _override(self, dotted: str, value: Any) -> None:
        try:
            self.data = apply_overrides(self.data, {dotted: value})
        except ValueError as e:
            raise SpecError(f"{self.path}: --set {e}") from e
        keys = split_key(dotted)
        self.lines = {path: line for path, line in self.lines.items() if path[: len(keys)] != keys}
        self._mark(keys, value)

    def _mark(self, path: tuple[str, ...], value: Any) -> None:
        self.lines[path] = 0
        for key, inner in value.items() if isinstance(value, dict) else ():
            self._mark((*path, str(key)), inner)

    def error(self, path: tuple[str, ...], message: str) -> SpecError:
        """The error at the nearest known line of `path`."""
        near = path
        while near and near not in self.lines:
            near = near[:-1]
        line = self.lines.get(near, 1)
        where = f"{self.path}:{line}" if line else f"{self.path} (--set {'.'.join(near)})"
        return SpecError(f"{where}: {'.'.join(path) + ': ' if path else ''}{message}")

    def build(self, cls: type[T]) -> T:
        try:
            return build_record(cls, self.data)
        except InvalidValue as e:
            raise self.error(e.path, e.message) from None


def list_given_keys(path: str | Path, overrides: dict[str, Any] | None = None) -> frozenset[str]:
    """Dotted paths a spec or its overrides set: they are not searched. `precision: auto` leaves it to the search."""
    source = YamlSource(path, overrides)
    found = set()
    for keys in source.lines:
        at: Any = source.data
        for key in keys:
            at = (
                at[int(key)]
                if isinstance(at, list)
                else at.get(key)
                if isinstance(at, dict)
                else None
            )
        if at != "auto" and not isinstance(at, dict):
            found.add(".".join(keys))
    return frozenset(found)
