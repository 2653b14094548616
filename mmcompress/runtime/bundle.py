"""The bundle on disk: `manifest.json` names every file with its SHA-256; anything else is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmcompress.errors import BundleError

BUNDLE_FORMAT, READABLE_FORMATS = 2, (1, 2)
"""2: a decode step takes its mask as an input."""


Manifest = dict[str, Any]


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_bundle_models(folder: str | Path) -> str:
    """One hash of all models of a bundle, whenever and wherever it was written."""
    files = read_manifest(folder)["files"]
    models = sorted(
        f"{name} {entry['sha256']}" for name, entry in files.items() if name.endswith(".onnx")
    )
    return hashlib.sha256("\n".join(models).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a bundle. Raises `BundleError`."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise BundleError(f"{folder}: not a bundle: it holds no manifest.json")
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["format"], manifest["files"]
        entries = [(str(n), str(f["sha256"])) for n, f in files.items()]
        used = {
            f
            for node in manifest["graph"]["nodes"].values()
            for f in node.get("files", {}).values()
        }
        configs = [n.get("config", {}) for n in manifest["graph"]["nodes"].values()]
        used |= {c[k] for c in configs for k in ("tokenizer", "texts", "bank") if k in c}
        manifest["graph"]["outputs"], manifest["graph"]["inputs"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BundleError(f"{path}: damaged: {type(e).__name__}: {e}") from e
    if version not in READABLE_FORMATS:
        raise BundleError(
            f"{path}: format {version}, this runtime reads formats {READABLE_FORMATS[0]} to {BUNDLE_FORMAT}"
        )
    if unlisted := used - {name for name, _ in entries}:
        raise BundleError(
            f"{path}: the graph uses '{min(unlisted)}', which is not among the bundle's files"
        )
    for name, _ in entries:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"{path}: the file name '{name}' leaves the bundle")
    return manifest


def verify_files(folder: str | Path, manifest: Manifest) -> None:
    """Check every file against its SHA-256. Raises `BundleError` naming the missing or altered file."""
    for name, entry in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise BundleError(f"{folder}: the file '{name}' is missing")
        if hash_file(path) != entry["sha256"]:
            raise BundleError(
                f"{folder}: the file '{name}' was altered: its SHA-256 is not the manifest's"
            )
