"""The folder that was meant where a path leads nowhere."""

from __future__ import annotations

import difflib
from pathlib import Path


def suggest_folder(missing: Path) -> str:
    """Suggest the folder that is named most like a missing one, for an error message.

    Args:
        missing: A path without a folder.

    Returns:
        `; did you mean 'PATH'?`, or where the path ends; empty where nothing is like it.
    """
    try:
        parent = missing.parent
        if not parent.is_dir():
            return f"; there is no '{parent}' either"
        names = [path.name for path in parent.iterdir() if path.is_dir()]
    except (OSError, ValueError):
        return ""
    similar_names = difflib.get_close_matches(missing.name, names, 1)
    return f"; did you mean '{parent / similar_names[0]}'?" if similar_names else ""
