"""YAML file -> `Spec` or `Space`; an error names file, line, value, choices and the nearest name."""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mmcompress.errors import SpecError
from mmcompress.records import InvalidValue, Latency, build_record
from mmcompress.registry import METRICS, PRECISIONS, suggest_nearest
from mmcompress.spec.schema import Space, Spec, apply_overrides, split_key

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
            raise SpecError(f"{path}: {'the file is empty' if root is None else 'expected a mapping at the top'}")
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
                    raise SpecError(f"{self.path}:{key.start_mark.line + 1}: '{name}' stands twice in one mapping")
                out[name] = self._plain(value, (*path, name))
                self.lines[(*path, name)] = key.start_mark.line + 1
            return out
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(v, (*path, str(i))) for i, v in enumerate(node.value)]
        try:
            value = SpecYaml("").construct_object(node, deep=True)
        except yaml.YAMLError as e:
            raise SpecError(f"{self.path}:{node.start_mark.line + 1}: {getattr(e, 'problem', e)}") from e
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


def load_spec(path: str | Path, overrides: dict[str, Any] | None = None) -> Spec:
    """Read, override and validate a pipeline spec, its graph included. Raises `SpecError`.

    File names in it may begin with `~`; relative ones are looked for in the spec's folder, then in the working one.
    """
    from mmcompress.graph.topology import validate_graph

    source = YamlSource(path, overrides)
    plugins = source.data.get("plugins") if isinstance(source.data, dict) else None
    if plugins and (here := str(Path.cwd())) not in sys.path:  # a console script does not look where it is started
        sys.path.append(here)
    for i, name in enumerate(plugins or ()):
        try:
            importlib.import_module(str(name))
        except ImportError as e:
            raise source.error(("plugins", str(i)), f"can't import '{name}': {e}") from e
    folder = Path(path).resolve().parent
    _resolve(source, folder)
    spec = source.build(Spec)
    for i, metric in enumerate(spec.metrics):
        if problem := METRICS.problem(metric):
            raise source.error(("metrics", str(i)), problem)
    for one in split_targets(spec):
        parse_target(one, source.error(("target",), ""))
    if spec.prune.sensitivity == "estimated" and spec.prune.importance != "fisher":
        raise source.error(
            ("prune", "sensitivity"),
            f"can be estimated from fisher scores, not from {spec.prune.importance}: add importance: fisher",
        )
    if spec.prune.sensitivity == "estimated" and spec.quantize.max_loss_increase:
        raise source.error(("quantize", "max_loss_increase"), "is found by running the pipeline; prune.sensitivity says estimated")
    for n, node in spec.nodes.items():
        if node.rewind and not node.source:
            raise source.error(("nodes", n, "rewind"), "this node has no model")
        if node.rewind and spec.prune.schedule != "rewind":
            raise source.error(
                ("nodes", n, "rewind"), f"prune.schedule is {spec.prune.schedule}, which rewinds nothing"
            )
    validate_graph(spec, source.error)
    return spec


def load_document(path: str | Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """A spec's own text as plain data, overrides applied and local names absolute; what it leaves open stays open."""
    source = YamlSource(path, overrides)
    _resolve(source, Path(path).resolve().parent)
    return dict(source.data)


def _resolve(source: YamlSource, folder: Path) -> None:
    """Make local file names absolute, so that the spec means the same on every worker."""
    data = source.data if isinstance(source.data, dict) else {}
    nodes = data.get("nodes")
    for node in nodes.values() if isinstance(nodes, dict) else ():
        for key in ("source", "rewind") if isinstance(node, dict) else ():
            text = node.get(key)
            if not isinstance(text, str) or not text:
                continue
            scheme, colon, rest = text.partition(":")
            library = colon and scheme in ("transformers", "open_clip")
            local, head = (rest, f"{scheme}:") if library else (text, "")
            name, at, file = local.partition("@") if scheme == "open_clip" else ("", "", local)
            if file.startswith((".", "~")) or any((place / file).is_dir() for place in (folder, Path.cwd()) if not at):
                node[key] = head + name + at + _local(folder, file)
        _resolve_key(node, "texts", folder)
    _resolve_key(data.get("measure"), "device", folder)
    section = data.get("data")
    _resolve_key(section.get("options") if isinstance(section, dict) else None, "path", folder)


def _resolve_key(section: Any, key: str, folder: Path) -> None:
    if isinstance(section, dict) and isinstance(section.get(key), str) and section[key]:
        section[key] = _local(folder, section[key])


def _local(folder: Path, name: str) -> str:
    """A file name as an absolute one; what is nowhere is told of as in the spec's folder."""
    path = Path(name).expanduser()
    beside = folder / path
    return str((path if path.exists() and not beside.exists() else beside).resolve())


SEARCHABLE_KEYS = (
    "nodes.*.prune.heads",
    "nodes.*.prune.ffn",
    "nodes.*.prune.tokens",
    "nodes.*.prune.drop",
    "nodes.*.precision",
    "prune.protection",
)


def list_given_keys(path: str | Path, overrides: dict[str, Any] | None = None) -> frozenset[str]:
    """Dotted paths a spec or its overrides set: they are not searched. `precision: auto` leaves it to the search."""
    source = YamlSource(path, overrides)
    found = set()
    for keys in source.lines:
        at: Any = source.data
        for key in keys:
            at = at[int(key)] if isinstance(at, list) else at.get(key) if isinstance(at, dict) else None
        if at != "auto" and not isinstance(at, dict):
            found.add(".".join(keys))
    return frozenset(found)


def load_space(path: str | Path, spec: Spec, fixed: frozenset[str] = frozenset()) -> Space:
    """Read a search space, spell out `*` for the models of `spec`, leave out what is `fixed`. Raises `SpecError`."""
    source = YamlSource(path)
    space = source.build(Space)
    dimensions = {}
    for dotted, d in space.dimensions.items():
        at = ("dimensions", dotted)
        if not d.choices and (d.low is None or d.high is None or d.low > d.high):
            raise source.error(at, "needs 'choices', or 'low' and 'high' with low <= high")
        keys, known = dotted.split("."), list(spec.model_nodes())
        if keys[0] == "nodes" and len(keys) > 1 and keys[1] != "*" and keys[1] not in known:
            raise source.error(at, f"unknown node '{keys[1]}'; {suggest_nearest(keys[1], known)}")
        if ".".join((keys[0], "*", *keys[2:]) if keys[0] == "nodes" else keys) not in SEARCHABLE_KEYS:
            raise source.error(at, f"'{dotted}' can't be searched; {suggest_nearest(dotted, SEARCHABLE_KEYS)}")
        if dotted.endswith("precision") != bool(d.choices):
            raise source.error(at, "a precision takes 'choices', everything else 'low' and 'high'")
        whole = dotted.endswith("drop")
        if d.step is not None and (d.step <= 0 or (whole and d.step % 1)):
            raise source.error(at, f"'step' must be {'a whole number' if whole else 'a number'} greater than 0")
        if problem := next((p for c in d.choices if (p := PRECISIONS.problem(c))), None):
            raise source.error(at, problem)
        low, high = (1.0, 100.0) if dotted.endswith("protection") else (0.0, 1000.0 if whole else 1.0)
        if not d.choices and not (low <= (d.low or 0.0) and (d.high or 0.0) <= high):
            raise source.error(at, f"must lie in {low:g} .. {high:g}")
        for name in known if keys[1] == "*" else [keys[1]]:
            if (full := dotted.replace("*", name)) not in fixed:
                dimensions[full] = replace(d, step=d.step or 1.0) if whole else d
    return Space(space.name, dimensions)


def split_targets(spec: Spec) -> tuple[str, ...]:
    """The targets of a spec: `1.5x,2x` are two."""
    return tuple(dict.fromkeys(part.strip() for part in str(spec.target).split(",")))


def require_one_target(spec: Spec) -> Spec:
    """The spec, if it has one target. Raises `SpecError`."""
    if len(split_targets(spec)) > 1:
        raise SpecError(f"target: one target, please, got '{spec.target}'")
    return spec


@dataclass(frozen=True)
class Goal:
    """What is to be reached: a `speedup` over the dense pipeline or a `latency` in ms, of the p50 or the p95."""

    kind: str
    value: float
    statistic: str = "p50"

    def target_ms(self, dense: Latency) -> float:
        """The budget, given what the dense pipeline takes."""
        return getattr(dense, self.statistic) / self.value if self.kind == "speedup" else self.value

    def p95_ratio(self, dense: Latency) -> float:
        """How far the statistic lies from the median: of the dense pipeline, for predictors know medians alone."""
        return getattr(dense, self.statistic) / dense.p50


def parse_target(text: str, error: Exception | None = None) -> Goal:
    """`2x`, `12ms`, `12ms p95`. Raises `SpecError`."""
    m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(x|ms)(\s+(p50|p95))?\s*", str(text))
    if not m or float(m.group(1)) <= 0 or (m.group(2) == "x" and float(m.group(1)) < 1):
        raise SpecError(f"{error or 'target: '}expected a target like 2x (at least 1x), 12ms or 12ms p95, got '{text}'")
    return Goal("speedup" if m.group(2) == "x" else "latency", float(m.group(1)), m.group(4) or "p50")
