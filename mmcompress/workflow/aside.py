"""The best artifact so far, set aside in `earlier/` while another is made; a move that is cut off can be ended."""

from __future__ import annotations

import shutil
from pathlib import Path

EARLIER, AHEAD, BACK = "earlier", "earlier.new", "earlier.back"
"""Where it lies, and the folders of a move there or back that is under way."""
ARTIFACTS = ("bundle", "weights", "fitted.json", "distill*.json", "outcomes.json", "summary.json")


def put(folder: Path) -> None:
    """Set the artifact of a run folder aside, in place of what was there."""
    ahead, target = folder / AHEAD, folder / EARLIER
    ahead.mkdir(exist_ok=True)
    for pattern in ARTIFACTS:
        for found in folder.glob(pattern):
            found.rename(ahead / found.name)
    shutil.rmtree(target, ignore_errors=True)
    ahead.rename(target)


def take_back(folder: Path) -> None:
    """Put what was set aside in place of the folder's artifact."""
    clear(folder)
    (folder / EARLIER).rename(folder / BACK)
    recover(folder)


def recover(folder: Path) -> None:
    """Go on with a move that was cut off."""
    if (folder / AHEAD).exists():
        put(folder)
    if (back := folder / BACK).exists():
        for found in back.iterdir():
            _remove(folder / found.name)
            found.rename(folder / found.name)
        back.rmdir()


def clear(folder: Path) -> None:
    """Remove the folder's artifact."""
    for pattern in ARTIFACTS:
        for found in folder.glob(pattern):
            _remove(found)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
