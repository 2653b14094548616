"""Keeps a run at a storage URL: the run works in a local copy, and snapshots of it go there.

A run folder can be resumed whenever its process dies, so a copy of one moment can be, too. A
snapshot is such a copy: files are linked until nothing changed between two looks at the folder.
Trials and progress are only ever appended to their files, so what is new of them goes alone.
No torch.
"""

from __future__ import annotations

import _thread
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.runtime.cache import locate_cache_folder
from mmcompress.spec.storage_urls import is_remote
from mmcompress.storage import is_leftover, replace_file
from mmcompress.workspace.folder import CLAIM_NAMES, LOCK_FILE
from mmcompress.workspace.lease import Lease, TellUser
from mmcompress.workspace.run_storage import RunStorage, Snapshot, hash_bytes, hash_file

COPIES_FOLDER = "runs"
"""The folder of the cache with the local copies of runs at storage URLs."""

SAVE_SECONDS = 5.0
"""Seconds between two snapshots: what a lost machine costs at most."""

SETTLED_SECONDS = 2
"""Seconds after its last change from which on a file is known by its size and its time. They are
longer than the tick of any usual file system."""

NANOSECONDS = 1_000_000_000
"""Nanoseconds of a second."""

MAX_LOOKS = 5
"""Times that a folder is looked at until nothing changes meanwhile."""

MAX_FINAL_OUTAGE_SECONDS = 300.0
"""Seconds that a storage may be away at the end of a run."""

SECONDS_BETWEEN_FINAL_SAVES = 5.0
"""Seconds between two tries to reach it."""

MAX_PIECES = 500
"""Pieces of a file from which on it is written as a whole again."""

APPENDED_FILES = ("study.journal", "progress.jsonl")
"""Names of files that only grow."""

LOCAL_NAMES = (LOCK_FILE, "scratch", "teacher_outputs", "training.room", "training.workers")
"""Names of what is of this machine alone, or can be made again."""

BEGUN_RECORD = "spec.json"
"""Name of the file that every run has from its beginning on."""

READ_NAMES = (
    "summary.json",
    "report.html",
    "report.md",
    "front.html",
    "front.md",
    "front.json",
)
"""Names of files that people read: they lie in the storage as plain files, too."""

READ_FOLDER = "bundle"
"""Name of folders of which the same is true."""


class CopyRemoved(DataError):
    """Somebody removed the local copy of a run that is under way."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What tells that a file is the same as at an earlier look."""

    inode: int
    """Its number in the file system."""
    size: int
    """Its bytes; 0 for a file that grows."""
    changed_ns: int
    """When it was changed last; 0 for a file that grows."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies in a folder."""

    files: dict[str, Entry]
    """The files by their paths."""
    empty_folders: tuple[str, ...]
    """The paths of folders that hold nothing."""


def locate_url_record(copy: Path) -> Path:
    """Return the file that names the URL of a local copy."""
    return copy.with_name(f"{copy.name}.url")


def locate_unsaved_record(copy: Path) -> Path:
    """Return the file that is there while a local copy may hold what was not saved yet."""
    return copy.with_name(f"{copy.name}.unsaved")


def locate_run_folder(out: str | Path) -> Path:
    """Return the folder that a run works in: its own, or the local copy of one at a storage URL."""
    text = str(out)
    if not is_remote(text):
        return Path(out)
    name = hash_bytes(text.rstrip("/").encode())
    return locate_cache_folder() / COPIES_FOLDER / name


@contextmanager
def keep_run(out: str | Path, *, resume: bool, tell: TellUser) -> Iterator[Path]:
    """Give the folder that a run works in; at a storage URL, keep it there until the block ends.

    Args:
        out: A folder, or a storage URL.
        resume: Whether a run that is there is gone on with.
        tell: Receives messages for a person; also from other threads.

    Raises:
        DataError: Another process works on the run, there is one that nobody asked to go on with,
            or the storage gives no answer.
        MissingPackage: The package of the storage is not installed.
    """
    folder = locate_run_folder(out)
    if not is_remote(str(out)):
        yield folder
        return
    storage = RunStorage(str(out))
    lease = Lease(storage, tell=tell, on_lost=_thread.interrupt_main)
    lease.take()
    try:
        mirror = RunMirror(folder, storage, lease=lease, tell=tell)
        mirror.bring_here(resume=resume)
        mirror.start()
        try:
            yield folder
        except BaseException:
            mirror.stop(is_failing=True)
            raise
        mirror.stop(is_failing=False)
    finally:
        lease.release()


def fetch_run(url: str, folder: Path) -> None:
    """Copy a run from a storage URL.

    Args:
        url: The storage URL.
        folder: The folder to write; what it held before is gone.

    Raises:
        DataError: There is no run, or it can't be read.
    """
    storage = RunStorage(url)
    snapshot = storage.read_snapshot()
    if snapshot is None or BEGUN_RECORD not in snapshot.files:
        raise DataError(f"{url}: there is no run, or nothing was made in it yet")
    storage.restore(snapshot, folder)


class RunMirror:
    """Brings a run folder to a storage, again and again.

    Args:
        folder: The folder.
        storage: The storage.
        lease: Where it is lost, nothing is written any more.
        tell: Receives that the storage is away, or back.
    """

    def __init__(self, folder: Path, storage: RunStorage, *, lease: Lease, tell: TellUser):
        self.folder = folder
        self.storage = storage
        self.lease = lease
        self._tell_user = tell
        self._frozen = folder.with_name(f"{folder.name}.frozen")
        self._saved_record = folder.with_name(f"{folder.name}.saved")
        self._unsaved_record = locate_unsaved_record(folder)
        self._snapshot: Snapshot | None = None
        self._pieces: dict[Entry, str] = {}
        self._grown: dict[str, _GrownFile] = {}
        self._is_away = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="mirror")

    def bring_here(self, *, resume: bool) -> None:
        """Make the local copy what the storage holds.

        A copy that was saved last from here stays: what was done after that is in it alone.

        Args:
            resume: Whether a run that is there is gone on with.

        Raises:
            DataError: There is a run, and nobody asked to go on with it.
        """
        snapshot = self.storage.read_snapshot()
        if snapshot is not None and snapshot.holds_more_than(CLAIM_NAMES) and not resume:
            raise DataError(
                f"{self.storage.url}: not empty; add --resume to go on with the run there, or "
                "choose another --out"
            )
        if snapshot is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not self._is_saved_from_here(snapshot):
            self._tell_user(f"fetching the run from {self.storage.url}")
            snapshot = self.storage.restore(snapshot, self.folder)
            self._note_saved(snapshot)
        self._snapshot = snapshot

    def start(self) -> None:
        """Save the folder every few seconds from now on."""
        self._unsaved_record.parent.mkdir(parents=True, exist_ok=True)
        self._unsaved_record.touch()
        self._thread.start()

    def stop(self, *, is_failing: bool) -> None:
        """Save the folder a last time, with what people read.

        Args:
            is_failing: An error ends the run, and is the one that a person should see.

        Raises:
            DataError: The storage was away for too long, or the local copy was removed.
        """
        self._is_over.set()
        self._thread.join()
        give_up_at = time.monotonic() + MAX_FINAL_OUTAGE_SECONDS
        while not self.lease.is_lost:
            try:
                self.save()
                self.storage.publish(self._list_read_files())
                self._unsaved_record.unlink(missing_ok=True)
                return
            except CopyRemoved as error:
                if not is_failing:
                    raise
                self._tell_user(str(error))
                return
            except DataError as error:
                self._tell_away(error)
                if time.monotonic() < give_up_at:
                    time.sleep(SECONDS_BETWEEN_FINAL_SAVES)
                    continue
                message = (
                    f"{error}; the run lies in {self.folder}, and the same command with --resume "
                    "brings it to the storage"
                )
                if not is_failing:
                    raise DataError(message) from error
                self._tell_user(message)
                return

    def save(self) -> bool:
        """Bring the folder as it is now to the storage.

        Returns:
            Whether it did not change meanwhile. Else the next time will do.

        Raises:
            CopyRemoved: The local copy was removed.
            DataError: The storage gives no answer.
        """
        if not self.folder.is_dir():
            return False
        self._note_url()
        snapshot = self._take_snapshot()
        if snapshot is None:
            return False
        earlier = self._snapshot
        if earlier is not None and BEGUN_RECORD in set(earlier.files) - set(snapshot.files):
            raise CopyRemoved(
                f"{self.folder}: the local copy of the run was removed; what was saved stays at "
                f"{self.storage.url}. Stop this run, and go on with --resume"
            )
        if earlier is not None and (snapshot.files, snapshot.empty_folders) == (
            earlier.files,
            earlier.empty_folders,
        ):
            return True
        if self.lease.is_lost:
            return False
        self.storage.write_snapshot(snapshot)
        # From here on the pieces of the one before count for nothing, whatever fails.
        self._snapshot = snapshot
        self._note_saved(snapshot)
        if earlier is not None:
            self.storage.remove_pieces(sorted(earlier.list_pieces() - snapshot.list_pieces()))
        return True

    def _keep(self) -> None:
        """Save the folder every few seconds until the run is over."""
        while not self._is_over.wait(SAVE_SECONDS) and not self.lease.is_lost:
            try:
                self.save()
            except DataError as error:
                self._tell_away(error)
            else:
                self._tell_back()

    def _tell_away(self, error: DataError) -> None:
        """Tell once that the storage gives no answer."""
        if not self._is_away:
            self._is_away = True
            self._tell_user(f"{error}; the run goes on, and is saved when the storage is back")

    def _tell_back(self) -> None:
        """Tell once that the storage is back."""
        if self._is_away:
            self._is_away = False
            self._tell_user(f"{self.storage.url} is back: the run is saved")

    def _take_snapshot(self) -> Snapshot | None:
        """Write the pieces of the folder as it is at one moment; None where it keeps changing."""
        known = self._snapshot.list_pieces() if self._snapshot else set()
        for _ in range(MAX_LOOKS):
            listing = list_files(self.folder)
            try:
                contents = self._freeze(listing)
            except FileNotFoundError:
                # It was replaced or removed meanwhile.
                continue
            if list_files(self.folder) != listing:
                continue
            files: dict[str, tuple[str, ...]] = {}
            for path, entry in listing.files.items():
                content = contents[path]
                if isinstance(content, bytes):
                    files[path] = self._write_grown_file(path, content)
                    continue
                if self._pieces.get(entry) not in known:
                    name = self._write_file(content, known=known)
                    known.add(name)
                    if _is_settled(entry):
                        self._pieces[entry] = name
                    files[path] = (name,)
                else:
                    files[path] = (self._pieces[entry],)
            shutil.rmtree(self._frozen, ignore_errors=True)
            return Snapshot(files=files, empty_folders=listing.empty_folders)
        return None

    def _write_file(self, file: Path, *, known: Collection[str]) -> str:
        """Write a file as one piece, unless that is known; returns its hash.

        A copy is hashed and written: a file may be written in place, through the link as well.
        """
        copy = self._frozen / "copy"
        shutil.copyfile(file, copy)
        name = hash_file(copy)
        if name not in known:
            self.storage.write_piece(name, copy)
        return name

    def _write_grown_file(self, path: str, content: bytes) -> tuple[str, ...]:
        """Write what is new of a file that only grows; returns the hashes of all its pieces."""
        grown = self._grown.setdefault(path, _GrownFile())
        try:
            for piece in grown.add(content):
                self.storage.write_piece(hash_bytes(piece), piece)
        except DataError:
            # The piece may be missing: next time the file is written as a whole.
            del self._grown[path]
            raise
        return tuple(grown.pieces)

    def _freeze(self, listing: Listing) -> dict[str, Path | bytes]:
        """Link every file of a listing, so that it can be read after it was replaced.

        Raises:
            FileNotFoundError: A file is not there any more.
        """
        shutil.rmtree(self._frozen, ignore_errors=True)
        self._frozen.mkdir(parents=True)
        contents: dict[str, Path | bytes] = {}
        for number, path in enumerate(listing.files):
            file = self.folder / path
            if file.name in APPENDED_FILES:
                contents[path] = file.read_bytes()
                continue
            link = self._frozen / str(number)
            _link_or_copy(file, link)
            contents[path] = link
        return contents

    def _list_read_files(self) -> dict[str, Path]:
        """List the files that people read, by their paths."""
        if not self.folder.is_dir():
            return {}
        files: dict[str, Path] = {}
        for path in list_files(self.folder).files:
            parts = path.split("/")
            if parts[-1] in READ_NAMES or READ_FOLDER in parts[:-1]:
                files[path] = self.folder / path
        return files

    def _is_saved_from_here(self, snapshot: Snapshot) -> bool:
        """Return whether the local copy was the last one to be saved."""
        if not self.folder.is_dir() or not self._saved_record.exists():
            return False
        return self._saved_record.read_text(encoding="utf-8") == snapshot.identity

    def _note_url(self) -> None:
        """Note down which run the local copy is of, for `clean --cache`."""
        record = locate_url_record(self.folder)
        if not record.exists():
            with replace_file(record) as unfinished:
                unfinished.write_text(self.storage.url, encoding="utf-8")

    def _note_saved(self, snapshot: Snapshot) -> None:
        """Note down which snapshot the local copy is, or has grown out of."""
        with replace_file(self._saved_record) as unfinished:
            unfinished.write_text(snapshot.identity, encoding="utf-8")


def _is_settled(entry: Entry) -> bool:
    """Return whether a file that is written again from now on would look otherwise.

    File systems tell times in ticks. Within one of them a file may change unseen.
    """
    return time.time_ns() - entry.changed_ns > SETTLED_SECONDS * NANOSECONDS


def _link_or_copy(file: Path, link: Path) -> None:
    """Link a file; copy it where the file system has no links."""
    try:
        os.link(file, link)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, link)


class _GrownFile:
    """A file that only grows, in pieces."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self._size = 0
        self._hash = hash_bytes(b"")

    def add(self, content: bytes) -> list[bytes]:
        """Take what the file holds now; returns the pieces that are new.

        A file that was written anew, such as after damage, is one piece again.
        """
        is_grown = hash_bytes(content[: self._size]) == self._hash
        if not is_grown or len(self.pieces) >= MAX_PIECES:
            self.pieces = []
            self._size = 0
        new = content[self._size :]
        self._size = len(content)
        self._hash = hash_bytes(content)
        if not new:
            return []
        self.pieces.append(hash_bytes(new))
        return [new]


def list_files(folder: Path) -> Listing:
    """List what of a run folder is saved."""
    files: dict[str, Entry] = {}
    empty_folders: list[str] = []
    for place, folder_names, file_names in os.walk(folder):
        folder_names[:] = sorted(filter(_is_saved, folder_names))
        root = Path(place)
        kept_names = sorted(filter(_is_saved, file_names))
        if not folder_names and not kept_names and root != folder:
            empty_folders.append(root.relative_to(folder).as_posix())
        for name in kept_names:
            try:
                status = (root / name).stat()
            except FileNotFoundError:
                continue
            grows = name in APPENDED_FILES
            files[(root / name).relative_to(folder).as_posix()] = Entry(
                inode=status.st_ino,
                size=0 if grows else status.st_size,
                changed_ns=0 if grows else status.st_mtime_ns,
            )
    return Listing(files=files, empty_folders=tuple(empty_folders))


def _is_saved(name: str) -> bool:
    """Return whether a file or folder of this name goes to the storage."""
    return name not in LOCAL_NAMES and not is_leftover(Path(name))
