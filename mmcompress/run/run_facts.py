"""What the shared records of a run were made of, as plain facts: weights, data, device, settings.

Two runs with the same facts would make the same records. A folder keeps its facts in `facts.json`,
and another run compares them with its own before it takes anything over.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.data.open_dataset import fetch_remote_options
from mmcompress.models.base import Model
from mmcompress.runtime.machine import list_package_versions
from mmcompress.storage import to_plain, write_record
from mmcompress.version import PACKAGE_FOLDER
from mmcompress.workspace.context import (
    RunContext,
    find_largest_position_cut,
    list_precisions,
)

Facts = Mapping[str, Any]
"""Plain values by name of the fact."""

SAMPLED_PAIRS = 16
"""Pairs of a split whose content is a fact: what draws or decodes them may have changed."""

SAMPLED_SPLITS = ("train", "val")
"""Splits that shared records are made of. The test split is not looked at."""

PACKAGES_WITHOUT_EFFECT = ("ray", "optuna")
"""Packages that no shared record depends on."""

CODE_PATTERNS = (
    "data/**/*.py",
    "export/**/*.py",
    "graph/**/*.py",
    "kinds/**/*.py",
    "measure/**/*.py",
    "models/**/*.py",
    "pipeline/**/*.py",
    "prune/**/*.py",
    "quantize/**/*.py",
    "runtime/**/*.py",
    "search/sensitivity/*.py",
    "search/worker.py",
    "distill/teacher_*.py",
)
"""Globs of the files of this package that make the shared records."""


def collect_facts(run: RunContext) -> dict[str, Any]:
    """Collect the facts of a run, from its settings to the content of its weights."""
    facts: dict[str, Any] = {"device": run.device}
    for package, version in list_package_versions().items():
        if package not in PACKAGES_WITHOUT_EFFECT:
            facts[f"version of {package}"] = version
    facts["code of mmcompress"] = _hash_own_code()
    for plugin in run.spec.plugins:
        facts[f"code of {plugin}"] = _hash_module(plugin)
    for node_name, model in run.models.items():
        facts[f"weights of {node_name}"] = hash_model(model)
        facts[f"precisions of {node_name}"] = list(list_precisions(run)[node_name])
        facts[f"largest cut of positions of {node_name}"] = find_largest_position_cut(
            run, node_name
        )
    for split in SAMPLED_SPLITS:
        facts[f"data: the first pairs of {split}"] = _hash_pairs(run, split)
    for name, value in fetch_remote_options(run.spec.data.options).items():
        if isinstance(value, str) and Path(value).exists():
            facts[f"data: files of {name}"] = hash_listing(Path(value))
    facts["texts of lookups"] = _hash_texts(json.dumps(to_plain(run.lookup_texts)))
    readings = run.device_readings
    facts["readings"] = _hash_texts(json.dumps(to_plain(readings))) if readings else ""
    return facts | flatten_settings(to_plain(run.spec))


def write_facts(run: RunContext) -> dict[str, Any]:
    """Return the facts of a run, and keep them in its folder unless an older run began it.

    The records of a folder that was begun without facts may be made of anything.
    """
    facts = collect_facts(run)
    folder = run.shared
    if not folder.facts.exists() and not folder.profile.exists():
        write_record(folder.facts, facts)
    return facts


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def hash_model(model: Model) -> str:
    """Hash all that a model computes with: code, settings, tokenizer and weights."""
    digest = hashlib.sha256(_hash_module(type(model).__module__).encode())
    described = [model.config, model.dims, to_plain(model.blocks), model.tokenizer_json]
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy()).data)
    return digest.hexdigest()


def hash_listing(path: Path) -> str:
    """Hash names, sizes and times of change of a file, or of all files in a folder."""
    lines = []
    for file in _list_files(path):
        state = file.stat()
        lines.append(f"{file.relative_to(path.parent)} {state.st_size} {state.st_mtime_ns}")
    return _hash_texts("\n".join(lines))


def _list_files(path: Path) -> list[Path]:
    """Return a file, or all files in a folder, sorted."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def _hash_pairs(run: RunContext, split: str) -> str:
    """Hash the inputs and the texts of the first pairs of a split."""
    pairs = run.data.load(split, SAMPLED_PAIRS)
    digest = hashlib.sha256(json.dumps([pairs.texts, pairs.names]).encode())
    for item in pairs.inputs:
        content = item.encode() if isinstance(item, str) else np.ascontiguousarray(item).tobytes()
        digest.update(content)
    return digest.hexdigest()


def _hash_own_code() -> str:
    """Hash the files of this package that make the shared records."""
    files: list[Path] = []
    for pattern in CODE_PATTERNS:
        files += PACKAGE_FOLDER.glob(pattern)
    return _hash_files(sorted(files))


def _hash_module(name: str) -> str:
    """Hash the file of a module; empty where it has none."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return _hash_files([Path(file)]) if file else ""


def _hash_files(files: Iterable[Path]) -> str:
    """Hash the content of some files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _hash_texts(text: str) -> str:
    """Hash a text."""
    return hashlib.sha256(text.encode()).hexdigest()
