"""What a run folder and the cache take on disk, and which parts can be made again. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmcompress.runtime.cache import locate_cache_folder
from mmcompress.storage import DAMAGED_SUFFIX
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import is_held
from mmcompress.workspace.mirror_run import COPIES_FOLDER, locate_unsaved_record, locate_url_record


@dataclass(frozen=True, kw_only=True)
class DiskPart:
    """A part of a folder."""

    path: Path
    """The file or folder."""
    size_bytes: int
    """What it takes on disk."""
    about: str
    """What it is, in words."""
    can_go: bool
    """Whether it may be deleted: a run makes it again, or nothing reads it."""


def list_run_parts(folder: RunFolder) -> list[DiskPart]:
    """List the parts of a run folder, the largest first.

    Args:
        folder: The run folder; those of its targets are parts of it.
    """
    parts: list[DiskPart] = []
    for place in [folder, *folder.list_inner_folders()]:
        parts += _list_removable(place)
    removable = {part.path for part in parts}
    for path in sorted(folder.path.rglob(f"*{DAMAGED_SUFFIX}*")):
        if removable.isdisjoint([path, *path.parents]):
            removable.add(path)
            about = "was damaged and set aside; nothing reads it"
            size_bytes = measure_size(path)
            parts.append(DiskPart(path=path, size_bytes=size_bytes, about=about, can_go=True))
    listed = {part.path for part in parts}
    for path in sorted(folder.path.iterdir()):
        if path not in listed:
            inside = sum(part.size_bytes for part in parts if path in part.path.parents)
            size_bytes = measure_size(path) - inside
            parts.append(DiskPart(path=path, size_bytes=size_bytes, about="kept", can_go=False))
    return sorted(parts, key=_get_size, reverse=True)


def _list_removable(place: RunFolder) -> list[DiskPart]:
    """List what can go of the folder of a run or a target."""
    about_by_path = {
        place.teacher_outputs: "outputs of the dense pipeline; a training asks it again",
        place.quantized: "the dense pipeline in other precisions; made again for a new profile",
        place.scratch: "bundles of structures that were measured; nothing reads them",
        place.weights_room: "room that a training held; nothing reads it",
        place.next.weights_room: "room that a training held; nothing reads it",
        place.short_finetuned.path: "weights of short trainings; a training begins without them",
    }
    if place.summary.exists():
        about_by_path[place.training_checkpoint] = "the state of a training that has ended"
        about_by_path[place.shared_training] = "the state of a training that has ended"
    return [
        DiskPart(path=path, size_bytes=measure_size(path), about=about, can_go=True)
        for path, about in about_by_path.items()
        if path.exists()
    ]


def list_cache_parts() -> list[DiskPart]:
    """List the parts of the cache, the largest first; all of them are made again.

    Raises:
        DataError: There is no place for a cache.
    """
    folder = locate_cache_folder()
    if not folder.is_dir():
        return []
    parts: list[DiskPart] = []
    for path in sorted(folder.iterdir()):
        if path.name == COPIES_FOLDER:
            parts += _list_copies(path)
            continue
        size_bytes = measure_size(path)
        parts.append(DiskPart(path=path, size_bytes=size_bytes, about="cached", can_go=True))
    return sorted(parts, key=_get_size, reverse=True)


def _list_copies(folder: Path) -> list[DiskPart]:
    """List the local copies of runs at storage URLs.

    Those that a process works on stay, and those of runs that were cut off before they were saved.
    """
    parts: list[DiskPart] = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        record = locate_url_record(path)
        url = record.read_text(encoding="utf-8") if record.exists() else "a storage URL"
        state = "it lies there, too"
        can_go = True
        if is_held(RunFolder(path=path)):
            state = "a process works on it"
            can_go = False
        elif locate_unsaved_record(path).exists():
            state = "the run was cut off, and its end may be here alone: --resume saves it"
            can_go = False
        parts.append(
            DiskPart(
                path=path,
                size_bytes=measure_size(path),
                about=f"copy of the run at {url}: {state}",
                can_go=can_go,
            )
        )
    return parts


def _get_size(part: DiskPart) -> int:
    """Return the key that sorts parts."""
    return part.size_bytes


def measure_size(path: Path) -> int:
    """Measure what a file or a folder takes, in bytes. Links count as links."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(measure_size(inner) for inner in path.iterdir())


def delete_parts(parts: Iterable[DiskPart]) -> int:
    """Delete the parts that may go.

    Returns:
        The bytes that are free now.
    """
    freed_bytes = 0
    for part in parts:
        if not part.can_go:
            continue
        if part.path.is_dir() and not part.path.is_symlink():
            shutil.rmtree(part.path)
        else:
            part.path.unlink(missing_ok=True)
        freed_bytes += part.size_bytes
    return freed_bytes
