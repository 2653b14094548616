"""Reads a spec from a YAML file, and checks it.

All errors of its values, graph, targets and options are reported at once.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcompress.errors import SpecError, shorten
from mmcompress.graph.inputs import find_data_input
from mmcompress.graph.judged_nodes import find_judged_nodes
from mmcompress.graph.partial_spec import read_partial_spec
from mmcompress.graph.validate import Problem, list_problems, raise_problems
from mmcompress.registry import METRICS
from mmcompress.spec.effort import apply_effort
from mmcompress.spec.loader import YamlSource
from mmcompress.spec.node_options import list_file_options
from mmcompress.spec.schema import Spec
from mmcompress.spec.storage_urls import is_remote
from mmcompress.spec.target import parse_target, split_targets

MEASURING_EXECUTOR = "ray"
"""The executor whose nodes can measure."""

FOLDER_SCHEMES = ("open_clip:local-dir", "local-dir", "transformers", "open_clip")
"""What may stand before the colon in front of a folder; longer ones come first."""


def load_spec(
    path: str | Path, overrides: dict[str, Any] | None = None, *, for_export: bool = False
) -> Spec:
    """Read, override and validate a pipeline spec, its graph included.

    File names in it may begin with `~`. Relative ones are looked for in the folder of the spec,
    then in the working folder.

    Args:
        path: The YAML file.
        overrides: Values by dotted key that take the place of what the file says.
        for_export: The pipeline is only exported: data may be missing, and no metric need fit.

    Returns:
        The spec with all defaults filled in, and file names made absolute.

    Raises:
        SpecError: Something is wrong; one line for each problem, with its place.
    """
    source = YamlSource(path, overrides)
    _import_plugins(source)
    _make_paths_absolute(source.data, Path(path).resolve().parent)
    _expand_metrics(source.data)
    source.data = apply_effort(source.data, overrides or {})
    if for_export:
        _fill_in_data(source.data)
    partial = read_partial_spec(source)
    problems = list(partial.problems)
    spec = partial.spec
    if spec:
        if "metrics" not in source.data:
            spec = _keep_default_metrics_that_fit(spec)
        for check in (_check_targets, _check_sensitivity, _check_rewinding, _check_measuring):
            problems += check(spec)
        problems += list_problems(
            spec,
            is_judged=partial.has_all_metrics and not for_export,
            unread_names=partial.unread_names,
        )
    raise_problems(problems, source.make_error)
    assert spec
    return spec


def _keep_default_metrics_that_fit(spec: Spec) -> Spec:
    """Leave out what the defaults would judge and the pipeline does not do, such as captions."""
    fitting = tuple(
        metric
        for metric in spec.metrics
        if find_judged_nodes(spec, METRICS.get_fact(metric.kind, "needs"))
    )
    return replace(spec, metrics=fitting)


def _fill_in_data(data: dict[str, Any]) -> None:
    """Give a spec without data inputs that are drawn, of the type that the pipeline takes."""
    inputs = data.get("inputs")
    if "data" in data or not isinstance(inputs, dict) or not inputs:
        return
    options = {"modality": inputs[find_data_input(inputs)]}
    data["data"] = {"kind": "drawn", "options": options}


def load_document(path: str | Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a spec as plain data, overrides applied and file names absolute.

    What the spec leaves open stays open: it is what a cluster is sent.
    """
    source = YamlSource(path, overrides)
    _make_paths_absolute(source.data, Path(path).resolve().parent)
    return apply_effort(source.data, overrides or {})


def _import_plugins(source: YamlSource) -> None:
    """Import the modules that a spec names: they add entries of their own."""
    plugins = source.data.get("plugins", ())
    if not isinstance(plugins, list | tuple):
        message = f"expected a list of modules, such as [my.module]; got {shorten(repr(plugins))}"
        raise source.make_error(("plugins",), message)
    # A console script does not look where it is started.
    for folder in (str(Path(source.path).resolve().parent), str(Path.cwd())):
        if plugins and folder not in sys.path:
            sys.path.append(folder)
    for i, name in enumerate(plugins):
        path = ("plugins", str(i))
        if not isinstance(name, str) or not name.strip(".") or name.startswith("."):
            message = f"expected the name of a module, got {shorten(repr(name))}"
            raise source.make_error(path, message)
        try:
            importlib.import_module(name)
        except Exception as error:  # a module of someone else's may raise anything
            message = f"can't import '{shorten(name)}': {type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError):
                message += (
                    "; a module is looked for in the folder of the spec, in the working folder, in "
                    "PYTHONPATH and among installed packages"
                )
            raise source.make_error(path, message) from error


def _expand_metrics(data: dict[str, Any]) -> None:
    """Expand `wer` to `{kind: wer}`."""
    metrics = data.get("metrics")
    if isinstance(metrics, list):
        data["metrics"] = [{"kind": m} if isinstance(m, str) else m for m in metrics]


def _check_targets(spec: Spec) -> list[Problem]:
    """Check that every target is one."""
    problems: list[Problem] = []
    for target in split_targets(spec):
        try:
            parse_target(target, "")
        except SpecError as error:
            problems.append((("target",), str(error)))
    return problems


def _check_sensitivity(spec: Spec) -> list[Problem]:
    """Check that sensitivity can be estimated from what the spec asks for."""
    if spec.prune.sensitivity != "estimated":
        return []
    problems: list[Problem] = []
    if spec.prune.importance != "fisher":
        message = (
            f"can be estimated from fisher scores, not from {spec.prune.importance}: "
            "add importance: fisher"
        )
        problems.append((("prune", "sensitivity"), message))
    if spec.quantize.max_loss_increase:
        message = "is found by running the pipeline; prune.sensitivity says estimated"
        problems.append((("quantize", "max_loss_increase"), message))
    return problems


def _check_rewinding(spec: Spec) -> list[Problem]:
    """Check that earlier weights are named only where something goes back to them."""
    problems: list[Problem] = []
    for name, node in spec.nodes.items():
        if not node.rewind:
            continue
        path = ("nodes", name, "rewind")
        if not node.source:
            problems.append((path, "this node has no model"))
        elif spec.prune.schedule != "rewind":
            message = f"prune.schedule is {spec.prune.schedule}, which rewinds nothing"
            problems.append((path, message))
    return problems


def _check_measuring(spec: Spec) -> list[Problem]:
    """Check that a node of a cluster can measure, and that nothing else is to give latencies."""
    if not spec.resources.measure.custom:
        return []
    problems: list[Problem] = []
    path = ("resources", "measure", "custom")
    if spec.search.executor != MEASURING_EXECUTOR:
        message = (
            f"needs search.executor: {MEASURING_EXECUTOR}; it is {spec.search.executor}, whose "
            "tasks stay on this machine"
        )
        problems.append((path, message))
    if spec.measure.readings:
        message = "measure.readings already says what the target device takes: leave one of them"
        problems.append((path, message))
    return problems


def _make_paths_absolute(data: dict[str, Any], folder: Path) -> None:
    """Make local file names absolute, in place: the spec then means the same on every worker."""
    nodes = data.get("nodes")
    for node in nodes.values() if isinstance(nodes, dict) else ():
        if isinstance(node, dict):
            for key in ("source", "rewind"):
                if isinstance(node.get(key), str) and node[key]:
                    node[key] = _resolve_source(node[key], folder)
            for key in list_file_options():
                _resolve_key(node, key, folder=folder)
    _resolve_key(data.get("measure"), "readings", folder=folder)
    section = data.get("data")
    options = section.get("options") if isinstance(section, dict) else None
    _resolve_key(options, "path", folder=folder)


def _resolve_source(text: str, folder: Path) -> str:
    """Return a source with its folder or file absolute; other sources stay as they are."""
    head = ""
    path_text = text
    for scheme in FOLDER_SCHEMES:
        if text.startswith(f"{scheme}:"):
            head = f"{scheme}:"
            path_text = text.removeprefix(head)
            break
    if head == "open_clip:" and "@" in path_text:
        name, _, file = path_text.partition("@")
        is_file = file.startswith((".", "~"))
        return f"{head}{name}@{_resolve_name(folder, file)}" if is_file else text
    is_folder = any((place / path_text).is_dir() for place in (folder, Path.cwd()))
    if path_text.startswith((".", "~")) or is_folder:
        return head + _resolve_name(folder, path_text)
    return text


def _resolve_key(section: Any, key: str, *, folder: Path) -> None:
    """Make the file name at a key of a section absolute, in place."""
    if not isinstance(section, dict) or not isinstance(section.get(key), str):
        return
    if section[key] and not is_remote(section[key]):
        section[key] = _resolve_name(folder, section[key])


def _resolve_name(folder: Path, name: str) -> str:
    """Return a file name as an absolute one.

    A missing file gets the path it would have in the spec's folder.
    """
    path = Path(name)
    # A user whom this machine does not know is no error yet: who opens the file says that it is
    # missing.
    with contextlib.suppress(RuntimeError):
        path = path.expanduser()
    beside_spec = folder / path
    if path.exists() and not beside_spec.exists():
        return str(path.resolve())
    return str(beside_spec.resolve())
