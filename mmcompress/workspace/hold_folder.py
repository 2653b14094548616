"""One process works on a run folder at a time: two would overwrite each other's records.

The lock is that of the kernel (`flock`), so it ends with its process, however that ends. The file
says who holds it. No torch.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmcompress.errors import DataError, SpecError
from mmcompress.spec.storage_urls import is_remote
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.process_owner import describe_owner, is_owner_alive

WAIT_OR_CHOOSE = "wait for its end or stop it, or choose another --out"
"""What helps a command that takes `--out` when another process holds its folder."""

WAIT = "wait for its end, or stop it first"
"""What helps a command that is about this very folder."""


@contextmanager
def hold_folder(path: str | Path, *, cure: str = WAIT_OR_CHOOSE) -> Iterator[None]:
    """Hold a run folder for the length of a block; it is made when it is missing.

    A lock that a dead process of this machine left is taken over.

    Args:
        path: The run folder. When it is empty at the end, it is removed again.
        cure: What helps when another process holds it, for a person.

    Raises:
        SpecError: It is a storage URL.
        DataError: Another process holds it, or it can't be written.
    """
    if is_remote(str(path)):
        raise SpecError(
            f"{path}: a run at a storage URL is made by `mmcompress run` or `submit` alone; "
            "name a folder of this machine"
        )
    folder = RunFolder(path=Path(path))
    is_new = not folder.path.exists()
    descriptor = _open_lock(folder)
    try:
        _take_lock(folder, descriptor, cure=cure)
        try:
            yield
        finally:
            folder.lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
        if is_new:
            # Nothing was written where a check failed.
            with suppress(OSError):
                folder.path.rmdir()


def is_held(folder: RunFolder) -> bool:
    """Return whether a process works on a run folder, on this machine or another."""
    if not folder.lock.exists():
        return False
    try:
        descriptor = os.open(folder.lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return _is_another_alive(_read_owner(descriptor))
    else:
        owner = _read_owner(descriptor)
        return bool(owner) and owner.get("host") != os.uname().nodename
    finally:
        os.close(descriptor)


def _open_lock(folder: RunFolder) -> int:
    """Open the lock file, or make it; returns its descriptor. Raises `DataError` where it can't."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        return os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(
            f"{folder}: can't be written: {error.strerror}; choose another --out"
        ) from error


def _take_lock(folder: RunFolder, descriptor: int, *, cure: str) -> None:
    """Lock the open file and write down who holds it. Raises `DataError` where another does."""
    has_lock = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _read_owner(descriptor)
        raise DataError(
            f"{folder}: {describe_owner(owner)} is working on this run: {cure}"
        ) from None
    except OSError:
        # Some network file systems have no such locks: there the file alone tells.
        has_lock = False
    # A process that ends removes the file, maybe after it was opened here.
    if not folder.lock.exists() or not _is_same_file(folder.lock, descriptor):
        raise DataError(f"{folder}: another process has just ended its work on this run: try again")
    owner = _read_owner(descriptor)
    host = os.uname().nodename
    # Not every file system tells other machines of a lock, so one of these may still be at work.
    may_be_at_work = bool(owner) and owner.get("host") != host
    if may_be_at_work or (not has_lock and _is_another_alive(owner)):
        raise DataError(
            f"{folder}: {describe_owner(owner)} began to work on this run and did not end: "
            f"stop it, or remove {folder.lock} if it is gone"
        )
    text = json.dumps({"pid": os.getpid(), "host": host})
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError as error:
        raise DataError(f"{folder}: can't be written: {error.strerror}") from error


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Return whether an open file is the one at a path."""
    return os.path.samestat(path.stat(), os.fstat(descriptor))


def _read_owner(descriptor: int) -> dict[str, object]:
    """Return who wrote the file: `pid` and `host`; nothing where it is empty or torn."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_another_alive(owner: dict[str, object]) -> bool:
    """Return whether another process than this one wrote a lock of this machine and is there."""
    return owner.get("pid") != os.getpid() and is_owner_alive(owner)
