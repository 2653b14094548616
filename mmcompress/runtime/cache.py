"""Where what was measured or converted once is kept."""

from __future__ import annotations

import os
from pathlib import Path


def locate_cache_folder() -> Path:
    """`$MMCOMPRESS_CACHE/mmcompress`, or that folder in the user's cache."""
    home = os.environ.get("MMCOMPRESS_CACHE") or os.environ.get(
        "XDG_CACHE_HOME", str(Path.home() / ".cache")
    )
    return Path(home) / "mmcompress"
