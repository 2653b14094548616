"""The best artifact so far, set aside in `earlier/` while another is made; a move that is cut off can be ended."""

from __future__ import annotations

import shutil
from pathlib import Path

STASH, STASHING, UNSTASHING = "earlier", "earlier.new", "earlier.back"
"""Where it lies, and the folders of a move there or back that is under way."""


ARTIFACTS = ("bundle", "weights", "fitted.json", "distill*.json", "outcomes.json", "summary.json")


def stash_artifact(folder: Path) -> None:
    """Set the artifact of a run folder aside, in place of what was there."""
    ahead, target = folder / STASHING, folder / STASH
    ahead.mkdir(exist_ok=True)
    for pattern in ARTIFACTS:
        for found in folder.glob(pattern):
            found.rename(ahead / found.name)
    shutil.rmtree(target, ignore_errors=True)
    ahead.rename(target)


def unstash_artifact(folder: Path) -> None:
    """Put what was set aside in place of the folder's artifact."""
    remove_artifact(folder)
    (folder / STASH).rename(folder / UNSTASHING)
    finish_interrupted_move(folder)


def finish_interrupted_move(folder: Path) -> None:
    """Go on with a move that was cut off."""
    if (folder / STASHING).exists():
        stash_artifact(folder)
    if (back := folder / UNSTASHING).exists():
        for found in back.iterdir():
            _remove(folder / found.name)
            found.rename(folder / found.name)
        back.rmdir()


def remove_artifact(folder: Path) -> None:
    """Remove the folder's artifact."""
    for pattern in ARTIFACTS:
        for found in folder.glob(pattern):
            _remove(found)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
