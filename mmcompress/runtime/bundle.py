"""The bundle on disk: `manifest.json` names every file with its SHA-256; anything else is refused
by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mmcompress.errors import BundleError
from mmcompress.registry import NODE_KINDS
from mmcompress.runtime.check_manifest import Manifest, list_form_problems
from mmcompress.runtime.check_values import check_text

BUNDLE_FORMAT = 2
"""Version of bundles that are written. In 2 a decode step takes its mask as an input; in 1 it makes
its own."""

READABLE_FORMATS = (1, 2)
"""Versions that this runtime runs."""

HASH_CHUNK_BYTES = 1 << 20
"""Bytes that are read at once: a model may be larger than the memory."""


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
        BundleError: The manifest is missing, damaged or of an unknown format. Or it names files
            that it does not list, or files outside the bundle.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        reason = "it holds no manifest.json" if Path(folder).is_dir() else "there is no such folder"
        raise BundleError(f"{folder}: not a bundle: {reason}{_suggest_bundle(Path(folder))}")
    try:
        manifest: Manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: damaged: {error}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    # Another format may have another form.
    if type(version) is int and version not in READABLE_FORMATS:
        raise BundleError(
            f"{path}: format {version}, this runtime reads formats "
            f"{READABLE_FORMATS[0]} to {READABLE_FORMATS[-1]}"
        )
    problem = next(list_form_problems(manifest), "")
    if problem or type(version) is not int:
        raise BundleError(f"{path}: damaged: {problem or 'format: expected a whole number'}")
    _check_file_names(path, manifest)
    return manifest


def _suggest_bundle(folder: Path) -> str:
    """Return the end of a message that names the bundle which may be meant; else nothing."""
    # A run folder has its bundle in it.
    place = folder / "bundle"
    if (place / "manifest.json").is_file():
        return f"; did you mean {place}?"
    return ""


def _check_file_names(path: Path, manifest: Manifest) -> None:
    """Raise a `BundleError` for a file that leads out of the bundle, or that has no hash."""
    listed_files = manifest["files"]
    for key, name in _list_used_files(manifest):
        if not isinstance(name, str):
            raise BundleError(f"{path}: damaged: {key}: {check_text(name)}")
        if name not in listed_files:
            raise BundleError(
                f"{path}: {key}: the graph uses '{name}', which is not among the bundle's files"
            )


def _list_used_files(manifest: Manifest) -> Iterator[tuple[str, object]]:
    """List (key, file name) of what the nodes of a manifest use."""
    for node_name, node in manifest["graph"]["nodes"].items():
        for graph_name, file_name in node.get("files", {}).items():
            yield f"graph.nodes.{node_name}.files.{graph_name}", file_name
        config = node.get("config", {})
        kind_name = node.get("kind")
        # A kind that nobody knows is refused when the bundle is loaded.
        is_known = kind_name in NODE_KINDS
        for key in NODE_KINDS.get(kind_name).file_keys if is_known else ():
            if key in config:
                yield f"graph.nodes.{node_name}.config.{key}", config[key]


def _find_root(folder: Path) -> Path:
    """Return the folder that every file of a bundle has to lie in.

    The cache of a hub keeps `snapshots/COMMIT/` with links to the `blobs/` beside `snapshots/`.
    """
    resolved_path = folder.resolve()
    is_snapshot = resolved_path.parent.name == "snapshots"
    return resolved_path.parents[1] if is_snapshot else resolved_path


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Check every file of a bundle against its SHA-256.

    Args:
        folder: The bundle.
        manifest: Its manifest.

    Raises:
        BundleError: A file is missing or altered, or lies elsewhere; the message names it.
    """
    root = _find_root(Path(folder))
    for name, entry in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise BundleError(f"{folder}: the file '{name}' is missing")
        if not path.resolve().is_relative_to(root):
            raise BundleError(
                f"{folder}: the file '{name}' is a link that leads out of the bundle; copy the "
                "bundle with what its links lead to (cp -rL)"
            )
        if hash_file(path) != entry["sha256"]:
            raise BundleError(
                f"{folder}: the file '{name}' was altered: its SHA-256 is not the manifest's"
            )
