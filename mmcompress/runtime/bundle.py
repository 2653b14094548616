"""The bundle on disk: `manifest.json` names every file with its SHA-256; anything else is refused
by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmcompress.errors import BundleError

BUNDLE_FORMAT = 2
"""Version of bundles that are written. In 2 a decode step takes its mask as an input; in 1 it makes
its own."""

READABLE_FORMATS = (1, 2)
"""Versions that this runtime runs."""

FILE_KEYS = ("tokenizer", "texts", "bank")
"""Keys of a node's configuration whose values are names of files."""

HASH_CHUNK_BYTES = 1 << 20
"""Bytes that are read at once: a model may be larger than the memory."""

Manifest = dict[str, Any]
"""The content of `manifest.json`."""


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_bundle_models(folder: str | Path) -> str:
    """Return one hash of all models of a bundle, whenever and wherever it was written.

    Args:
        folder: The bundle.

    Returns:
        A SHA-256 in hexadecimal digits.

    Raises:
        BundleError: The manifest is missing or damaged.
    """
    lines: list[str] = []
    for name, entry in read_manifest(folder)["files"].items():
        if name.endswith(".onnx"):
            lines.append(f"{name} {entry['sha256']}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a bundle, and check its form.

    Args:
        folder: The bundle.

    Returns:
        The content of `manifest.json`.

    Raises:
        BundleError: The manifest is missing, damaged or of an unknown format, or it names files
        that it does not
            list, or files outside the bundle.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise BundleError(f"{folder}: not a bundle: it holds no manifest.json")
    try:
        manifest: Manifest = json.loads(path.read_text())
        version = manifest["format"]
        listed_files = _list_files(manifest)
        used_files = _list_used_files(manifest)
        _check_graph_keys(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if version not in READABLE_FORMATS:
        raise BundleError(
            f"{path}: format {version}, this runtime reads formats "
            f"{READABLE_FORMATS[0]} to {READABLE_FORMATS[-1]}"
        )
    unlisted_files = used_files - set(listed_files)
    if unlisted_files:
        raise BundleError(
            f"{path}: the graph uses '{min(unlisted_files)}', which is not among the bundle's files"
        )
    _refuse_outside_files(path, listed_files)
    return manifest


def _list_files(manifest: Manifest) -> list[str]:
    """List the files that a manifest has a hash for. Raises what a damaged one leads to."""
    names: list[str] = []
    for name, entry in manifest["files"].items():
        if "sha256" not in entry:
            raise KeyError("sha256")
        names.append(str(name))
    return names


def _list_used_files(manifest: Manifest) -> set[str]:
    """List the files that the nodes of a manifest use."""
    used_files: set[str] = set()
    for node in manifest["graph"]["nodes"].values():
        used_files.update(node.get("files", {}).values())
        config = node.get("config", {})
        used_files.update(config[key] for key in FILE_KEYS if key in config)
    return used_files


def _check_graph_keys(manifest: Manifest) -> None:
    """Raise a `KeyError` when the graph has no outputs or no inputs."""
    for key in ("outputs", "inputs"):
        if key not in manifest["graph"]:
            raise KeyError(key)


def _refuse_outside_files(path: Path, names: Iterable[str]) -> None:
    """Raise a `BundleError` for a file name that leads out of the bundle."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"{path}: the file name '{name}' leaves the bundle")


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Check every file of a bundle against its SHA-256.

    Args:
        folder: The bundle.
        manifest: Its manifest.

    Raises:
        BundleError: A file is missing or altered; the message names it.
    """
    for name, entry in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise BundleError(f"{folder}: the file '{name}' is missing")
        if hash_file(path) != entry["sha256"]:
            raise BundleError(
                f"{folder}: the file '{name}' was altered: its SHA-256 is not the manifest's"
            )
