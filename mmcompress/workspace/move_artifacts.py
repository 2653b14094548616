"""Moves of artifacts in a run folder: the next one becomes the best, is discarded or set aside.

Every move can be cut off at any moment, and `finish_interrupted_move` completes it. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mmcompress.storage import UNFINISHED_SUFFIX, remove_path
from mmcompress.workspace.folder import (
    BEST_FOLDER,
    BETTER_FOLDER,
    DISCARDED_FOLDER,
    NEXT_FOLDER,
    OLD_RESTORING_FOLDER,
    OLD_STASH_FOLDER,
    OLD_STASHING_FOLDER,
    RunFolder,
)


def begin_next(folder: RunFolder) -> RunFolder:
    """Begin another artifact while the best one stays in its place; returns the folder with it."""
    folder.next.artifact_path.mkdir(exist_ok=True)
    return folder.next


def promote_next(folder: RunFolder, *, goes_on: bool) -> None:
    """Put the next artifact in the place of the best one, which is removed.

    Args:
        folder: The folder of the target.
        goes_on: A further artifact is made after it.
    """
    name = BETTER_FOLDER if goes_on else BEST_FOLDER
    folder.next.artifact_path.rename(folder.path / name)
    finish_interrupted_move(folder)


def discard_next(folder: RunFolder, *, goes_on: bool) -> None:
    """Remove the next artifact: the best one stays.

    Args:
        folder: The folder of the target.
        goes_on: A further artifact is made after it.
    """
    name = DISCARDED_FOLDER if goes_on else f"{NEXT_FOLDER}{UNFINISHED_SUFFIX}"
    remove_path(folder.path / name)
    folder.next.artifact_path.rename(folder.path / name)
    if goes_on:
        finish_interrupted_move(folder)
    remove_path(folder.path / name)


def remove_artifact(folder: RunFolder) -> None:
    """Remove the artifact of a folder."""
    for path in folder.list_artifact():
        remove_path(path)


def move_unproved_artifact(folder: RunFolder) -> RunFolder:
    """Move the artifact, whose proof failed, to a folder of its own; returns that folder.

    The proof goes last: without it the move is not complete, and is made again.
    """
    # One whose proof was damaged and set aside counts as well.
    records = folder.unproved.glob(f"*/{folder.failed_proof.name}*")
    number = len({record.parent for record in records}) + 1
    unproved = RunFolder(path=folder.unproved / str(number))
    unproved.path.mkdir(parents=True, exist_ok=True)
    for path in folder.list_artifact():
        remove_path(unproved.path / path.name)
        path.rename(unproved.path / path.name)
    folder.failed_proof.rename(unproved.failed_proof)
    return unproved


def finish_interrupted_move(folder: RunFolder) -> None:
    """Complete what was cut off: the next artifact becomes the best, or is set aside as unproved.

    A folder of an earlier version keeps its best artifact elsewhere; it is put in its place.
    """
    for artifact_folder in (folder.best, folder.next):
        if artifact_folder.failed_proof.exists():
            move_unproved_artifact(artifact_folder)
    if (folder.path / DISCARDED_FOLDER).exists():
        begin_next(folder)
        remove_path(folder.path / DISCARDED_FOLDER)
    _convert_old_stash(folder)
    for name in (BETTER_FOLDER, BEST_FOLDER):
        if (folder.path / name).exists():
            _take_artifact(folder, folder.path / name, goes_on=name == BETTER_FOLDER)


def _convert_old_stash(folder: RunFolder) -> None:
    """Turn what an earlier version has set aside, or was setting aside, into the best artifact.

    What it was making in its place becomes the next one.
    """
    stashing = folder.path / OLD_STASHING_FOLDER
    stash = folder.path / OLD_STASH_FOLDER
    restoring = folder.path / OLD_RESTORING_FOLDER
    if stashing.exists():
        for path in folder.best.list_artifact():
            path.rename(stashing / path.name)
        remove_path(stash)
        stashing.rename(stash)
    if stash.exists():
        next_folder = begin_next(folder)
        for path in [*folder.best.list_artifact(), *folder.path.glob("training.*")]:
            remove_path(next_folder.artifact_path / path.name)
            path.rename(next_folder.artifact_path / path.name)
        stash.rename(folder.path / BETTER_FOLDER)
    if restoring.exists():
        restoring.rename(folder.path / BEST_FOLDER)


def _take_artifact(folder: RunFolder, place: Path, *, goes_on: bool) -> None:
    """Move an artifact from a place into its folder, instead of the one there.

    The old summary is removed last, and the new one is moved last. So a move that was cut off knows
    where it stopped.
    """
    summary = folder.best.summary
    if summary.exists() and (place / summary.name).exists():
        for path in _put_last(summary.name, folder.best.list_artifact()):
            remove_path(path)
    for path in _put_last(summary.name, place.iterdir()):
        remove_path(folder.path / path.name)
        path.rename(folder.path / path.name)
    if goes_on:
        begin_next(folder)
    place.rmdir()


def _put_last(name: str, paths: Iterable[Path]) -> list[Path]:
    """Return paths in an order in which the one of some name is the last."""
    sorted_paths = sorted(paths)
    named_paths = [path for path in sorted_paths if path.name == name]
    return [path for path in sorted_paths if path not in named_paths] + named_paths


def remove_unfinished(folder: RunFolder) -> None:
    """Remove what a killed process was writing. No process may work on the folder."""
    for path in folder.list_unfinished():
        remove_path(path)
