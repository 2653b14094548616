"""TODO."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from mmcompress.graph.validate import validate_graph
from mmcompress.spec.loader import YamlSource
from mmcompress.spec.schema import Spec
from mmcompress.spec.target import parse_target, split_targets


def load_spec(path: str | Path, overrides: dict[str, Any] | None = None) -> Spec:
    """Read, override and validate a pipeline spec, its graph included. Raises `SpecError`.

    File names in it may begin with `~`; relative ones are looked for in the spec's folder, then in the working one.
    """

    source = YamlSource(path, overrides)
    plugins = source.data.get("plugins") if isinstance(source.data, dict) else None
    if (
        plugins and (here := str(Path.cwd())) not in sys.path
    ):  # a console script does not look where it is started
        sys.path.append(here)
    for i, name in enumerate(plugins or ()):
        try:
            importlib.import_module(str(name))
        except ImportError as e:
            raise source.error(("plugins", str(i)), f"can't import '{name}': {e}") from e
    folder = Path(path).resolve().parent
    _resolve(source, folder)
    _expand_metrics(source.data)
    spec = source.build(Spec)
    for one in split_targets(spec):
        parse_target(one, source.error(("target",), ""))
    if spec.prune.sensitivity == "estimated" and spec.prune.importance != "fisher":
        raise source.error(
            ("prune", "sensitivity"),
            f"can be estimated from fisher scores, not from {spec.prune.importance}: add importance: fisher",
        )
    if spec.prune.sensitivity == "estimated" and spec.quantize.max_loss_increase:
        raise source.error(
            ("quantize", "max_loss_increase"),
            "is found by running the pipeline; prune.sensitivity says estimated",
        )
    for n, node in spec.nodes.items():
        if node.rewind and not node.source:
            raise source.error(("nodes", n, "rewind"), "this node has no model")
        if node.rewind and spec.prune.schedule != "rewind":
            raise source.error(
                ("nodes", n, "rewind"),
                f"prune.schedule is {spec.prune.schedule}, which rewinds nothing",
            )
    validate_graph(spec, source.error)
    return spec


def _expand_metrics(data: dict[str, Any]) -> None:
    """Write a metric that is named alone as the mapping that it stands for: `wer` as `{kind: wer}`."""
    metrics = data.get("metrics")
    if isinstance(metrics, list):
        data["metrics"] = [{"kind": m} if isinstance(m, str) else m for m in metrics]


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
            if file.startswith((".", "~")) or any(
                (place / file).is_dir() for place in (folder, Path.cwd()) if not at
            ):
                node[key] = head + name + at + _local(folder, file)
        _resolve_key(node, "texts", folder=folder)
    _resolve_key(data.get("measure"), "readings", folder=folder)
    section = data.get("data")
    _resolve_key(
        section.get("options") if isinstance(section, dict) else None, "path", folder=folder
    )


def _resolve_key(section: Any, key: str, *, folder: Path) -> None:
    if isinstance(section, dict) and isinstance(section.get(key), str) and section[key]:
        section[key] = _local(folder, section[key])


def _local(folder: Path, name: str) -> str:
    """A file name as an absolute one; what is nowhere is told of as in the spec's folder."""
    path = Path(name).expanduser()
    beside = folder / path
    return str((path if path.exists() and not beside.exists() else beside).resolve())
