"""A run as those see it who only watch: in its folder, or at the storage URL that it is kept at.

No torch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

from mmcompress.errors import DataError
from mmcompress.spec.storage_urls import is_remote
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import is_held
from mmcompress.workspace.lease import LEASE_FILE, LEASE_SECONDS
from mmcompress.workspace.run_storage import RunStorage, Snapshot

READ_FILES = ("progress.jsonl", "summary.json", "spec.json")
"""Names of the files of a stored run that are read. Of all others it is enough that they are
there."""

SECONDS_BETWEEN_LOOKS = 0.5
"""Seconds after which a folder is looked at again."""

SECONDS_BETWEEN_REMOTE_LOOKS = 3.0
"""Seconds after which a storage is asked again."""


class WatchedRun(Protocol):
    """A run that is watched."""

    folder: RunFolder
    """What is known of it."""
    seconds_between_looks: float
    """Seconds after which a look may show something new."""

    def look(self) -> bool:
        """Bring the folder up to date; returns whether a process works on the run."""
        ...


class LocalRun:
    """A run in a folder of this machine."""

    def __init__(self, folder: Path):
        self.folder = RunFolder(path=folder)
        self.seconds_between_looks = SECONDS_BETWEEN_LOOKS

    def look(self) -> bool:
        """Return whether a process works on the run."""
        return is_held(self.folder)


class StoredRun:
    """A run at a storage URL: what is read of its snapshots is written into a folder here.

    A process works on it as long as its lease changes. One that has not changed for a while is that
    of a process that died.

    Args:
        url: The storage URL.
        folder: An empty folder.
    """

    def __init__(self, url: str, folder: Path):
        self.folder = RunFolder(path=folder)
        self.seconds_between_looks = SECONDS_BETWEEN_REMOTE_LOOKS
        self._storage = RunStorage(url)
        self._snapshot: Snapshot | None = None
        self._lease: object = None
        self._lease_changed_at = time.monotonic()

    def look(self) -> bool:
        """Read the lease, then the snapshot; returns whether a process works on the run.

        Raises:
            DataError: The storage gives no answer, or what it holds is damaged.
        """
        lease = self._storage.read_json(LEASE_FILE)
        if lease != self._lease:
            self._lease = lease
            self._lease_changed_at = time.monotonic()
        snapshot = self._storage.read_snapshot()
        if snapshot is not None:
            self._write_what_is_new(snapshot)
        is_fresh = time.monotonic() - self._lease_changed_at < LEASE_SECONDS
        return lease is not None and is_fresh

    def _write_what_is_new(self, snapshot: Snapshot) -> None:
        """Bring the folder to the state of a snapshot."""
        known = self._snapshot.files if self._snapshot is not None else {}
        for path in known.keys() - snapshot.files.keys():
            (self.folder.path / path).unlink(missing_ok=True)
        for path, pieces in snapshot.files.items():
            if known.get(path) == pieces:
                continue
            target = self.folder.path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if PurePosixPath(path).name not in READ_FILES:
                target.touch()
                continue
            content = self._storage.read_pieces(pieces)
            if content is None:
                # A newer snapshot has taken its place: the next look reads that.
                return
            target.write_bytes(content)
        for path in snapshot.empty_folders:
            (self.folder.path / path).mkdir(parents=True, exist_ok=True)
        self._snapshot = snapshot


@contextmanager
def open_watched_run(place: str) -> Iterator[WatchedRun]:
    """Open a run to watch it.

    Args:
        place: A run folder, or a storage URL.

    Raises:
        DataError: It is a URL that holds no run, or the storage gives no answer. Or it is a folder
            that holds something else.
    """
    if not is_remote(place):
        _refuse_other_folder(Path(place))
        yield LocalRun(Path(place))
        return
    with tempfile.TemporaryDirectory() as scratch:
        run = StoredRun(place, Path(scratch) / "run")
        if not run.look() and not run.folder.path.exists():
            raise DataError(f"{place}: there is no run, or nothing was made in it yet")
        yield run


def _refuse_other_folder(path: Path) -> None:
    """Raise `DataError` for a folder that no run works in: to wait for one would be in vain."""
    folder = RunFolder(path=path)
    begun = (folder.lock, folder.progress, folder.spec)
    is_in_use = path.is_dir() and any(path.iterdir())
    if is_in_use and not any(file.exists() for file in begun):
        raise DataError(f"{path}: no run folder: it holds other files")
