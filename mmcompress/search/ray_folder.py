"""The folder that a local Ray keeps its sockets in. Their paths have to be short. No Ray."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmcompress.errors import ClusterError

MAX_SOCKET_PATH = 107
"""Bytes of the path of a Unix socket (`sun_path` of Linux, without its end)."""

RAY_SOCKET_PATH = "/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
"""What Ray 2 adds to its folder at most; the last number of a session is a process."""

SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders that every Linux has, for where the user's own is too long."""


def choose_ray_folder(short_folders: Sequence[str] = SHORT_FOLDERS) -> str:
    """Choose a folder for a local Ray: the usual one, or a short one where that is too long.

    Args:
        short_folders: Where a short one may be made.

    Returns:
        The folder; it need not exist.

    Raises:
        ClusterError: None can be written that is short enough.
    """
    default_folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    candidates = [Path(default_folder) / "ray"]
    # Others may have a Ray here too, in a folder that is theirs alone.
    candidates += [Path(folder) / f"ray-{os.getuid()}" for folder in short_folders]
    for folder in candidates:
        if _is_short(folder) and _can_be_written(folder):
            return str(folder)
    raise ClusterError(
        f"Ray needs a folder for its sockets, at most {_count_free_bytes()} bytes long; "
        f"{candidates[0]} has {len(os.fsencode(candidates[0]))}, or can't be written. "
        "Set RAY_TMPDIR to a short one, or search.executor to process"
    )


def _count_free_bytes() -> int:
    """Return the bytes that the path of Ray's folder may have."""
    return MAX_SOCKET_PATH - len(RAY_SOCKET_PATH)


def _is_short(folder: Path) -> bool:
    """Return whether the paths of sockets in a folder are short enough."""
    return len(os.fsencode(folder)) <= _count_free_bytes()


def _can_be_written(folder: Path) -> bool:
    """Return whether a folder, or the one that it would be made in, can be written."""
    place = folder if folder.exists() else folder.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
