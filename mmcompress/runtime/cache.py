"""Where results that take long are kept between runs: device tables, converted weights."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mmcompress.errors import DataError

CACHE_CURE = "set MMCOMPRESS_CACHE to a folder that can be written"
"""What a person can do where there is no cache."""


def locate_cache_folder() -> Path:
    """Locate the cache folder; it may not exist yet.

    Returns:
        `$MMCOMPRESS_CACHE/mmcompress`, or `mmcompress` in the user's cache (XDG base directories).

    Raises:
        DataError: No folder is named, and the user has no home.
    """
    for variable in ("MMCOMPRESS_CACHE", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / "mmcompress"
    try:
        return Path.home() / ".cache" / "mmcompress"
    except RuntimeError as error:
        raise DataError(f"there is no home folder for the cache: {CACHE_CURE}") from error


def find_cache_fault() -> str:
    """Find out what is wrong with the cache folder.

    Returns:
        A message with its cure; empty where the folder can be written.
    """
    try:
        folder = locate_cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"the cache {error.filename} can't be written: {error.strerror}; {CACHE_CURE}"
