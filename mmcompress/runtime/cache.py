"""Where results that take long are kept between runs: device tables, converted weights."""

from __future__ import annotations

import os
from pathlib import Path


def locate_cache_folder() -> Path:
    """Locate the cache folder; it may not exist yet.

    Returns:
        `$MMCOMPRESS_CACHE/mmcompress`, or `mmcompress` in the user's cache (XDG base directories).
    """
    own_cache = os.environ.get("MMCOMPRESS_CACHE")
    if own_cache:
        return Path(own_cache) / "mmcompress"
    user_cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(user_cache) / "mmcompress"
