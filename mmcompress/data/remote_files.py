"""Files at a storage URL, such as `s3://bucket/clip`. Weights and data are fetched into the cache.

Each machine fetches them once: the cache knows them by a hash of the URL and of what the storage
says of every file. fsspec reads the storage (https://filesystem-spec.readthedocs.io).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmcompress.errors import DataError, MissingPackage, MmcompressError
from mmcompress.registry import OPTIONAL_PACKAGES
from mmcompress.runtime.addresses import hide_password
from mmcompress.runtime.cache import locate_cache_folder
from mmcompress.runtime.environment import BYTES_PER_GB
from mmcompress.spec.storage_urls import REMOTE_PACKAGES
from mmcompress.storage import is_leftover, replace_folder

CONTENT_KEYS = ("ETag", "etag", "md5Hash", "md5", "generation", "LastModified", "mtime", "updated")
"""What storages say of a file that changes with its content."""

CONTAINER_SCHEMES = ("abfs", "abfss", "az")
"""Schemes whose URLs may name a container ahead of an `@`."""

REMOTE_FOLDER = "remote"
"""The folder of fetched files in the cache."""

KEPT_SECONDS = 24 * 3600.0
"""Seconds after their last use in which fetched files are kept: a run may still read them."""


def fetch_remote(url: str) -> Path:
    """Fetch a folder or a file, unless the cache has it as it is now.

    Args:
        url: Such as `s3://bucket/folder`. Credentials come from where the storage's own tools look
            for them.

    Returns:
        The folder or file in the cache.

    Raises:
        DataError: There is nothing at the URL, or it can't be read.
        MissingPackage: The package that reads this storage is not installed.
    """
    filesystem = open_filesystem(url)
    with name_storage_errors(url, "can't be read"):
        root = filesystem._strip_protocol(url).rstrip("/")
        files: dict[str, Mapping[str, Any]] = filesystem.find(root, detail=True)
        if not files:
            raise DataError(f"{url}: there is nothing")
        folder = locate_cache_folder() / REMOTE_FOLDER / _hash_listing(url, files)
        names = {remote: _name_locally(remote, root) for remote in files}
        if not folder.exists():
            with replace_folder(folder) as unfinished:
                for remote, name in names.items():
                    target = unfinished / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    filesystem.get_file(remote, str(target))
    os.utime(folder)
    is_file = list(files) == [root]
    return folder / names[root] if is_file else folder


def trim_remote_cache(max_gb: float) -> list[Path]:
    """Remove the fetched files that were not used for longest, until the rest fits.

    Args:
        max_gb: Gigabytes that fetched files may take. Those used within a day stay in any case.

    Returns:
        What was removed.
    """
    place = locate_cache_folder() / REMOTE_FOLDER
    if not place.is_dir():
        return []
    folders = [path for path in place.iterdir() if path.is_dir() and not is_leftover(path)]
    folders.sort(key=_read_last_use)
    sizes = {folder: _measure_bytes(folder) for folder in folders}
    total = sum(sizes.values())
    removed: list[Path] = []
    for folder in folders:
        is_in_use = time.time() - _read_last_use(folder) < KEPT_SECONDS
        if total <= max_gb * BYTES_PER_GB or is_in_use:
            break
        shutil.rmtree(folder, ignore_errors=True)
        total -= sizes[folder]
        removed.append(folder)
    return removed


@contextmanager
def name_storage_errors(url: str, problem: str) -> Iterator[None]:
    """Turn what a storage raises in the block into a `DataError` that names its URL.

    Args:
        url: Where the files are.
        problem: What can't be done, for a person: "can't be read".
    """
    try:
        yield
    except MmcompressError:
        raise
    except Exception as error:  # every storage raises types of its own
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"{url}: {problem}: {reason}") from error


def open_filesystem(url: str) -> Any:
    """Return fsspec's file system of a URL.

    Raises:
        DataError: The URL holds credentials, which would stand in logs and records.
        MissingPackage: The package that reads this storage is not installed.
    """
    scheme, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0] and scheme not in CONTAINER_SCHEMES:
        raise DataError(
            f"{hide_password(url)}: a storage URL holds no credentials; they come from the "
            "environment or the files of the storage's own tools"
        )
    package = REMOTE_PACKAGES[scheme]
    try:
        fsspec = importlib.import_module("fsspec")
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingPackage(package, OPTIONAL_PACKAGES[package].extra) from error
    return fsspec.filesystem(scheme, skip_instance_cache=True)


def _hash_listing(url: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a hash that changes with what the storage says of any file."""
    listing = []
    for name, facts in sorted(files.items()):
        known = [str(facts[key]) for key in CONTENT_KEYS if key in facts]
        listing.append([name, facts.get("size"), known])
    text = json.dumps([url.rstrip("/"), listing])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _name_locally(remote: str, root: str) -> str:
    """Return the name of a remote file in the cache: its path in the folder, or its own name."""
    inside = remote.removeprefix(root).strip("/")
    if ".." in inside.split("/"):
        raise DataError(f"{remote}: a name with '..' is not fetched")
    return inside or remote.rpartition("/")[2]


def _read_last_use(folder: Path) -> float:
    return folder.stat().st_mtime


def _measure_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
