"""How this program is called, for lines that a person copies."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def name_program() -> str:
    """Return how this program is called here: its path, where its name is not on the PATH."""
    name = "mmcompress"
    beside_python = Path(sys.executable).parent / name
    if shutil.which(name) is None and beside_python.is_file():
        return os.path.relpath(beside_python)
    return name
