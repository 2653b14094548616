"""A run folder at a storage URL, such as `s3://bucket/run`: snapshots, and what people read.

    lease.json             who works on the run
    state/snapshot.json    the files of the run folder, each with the hashes of its pieces
    state/pieces/HASH      their content
    report.html, bundle/   what people read, as plain files

A snapshot is replaced by writing one object, so a reader finds the old one or the new one, whole.
fsspec reads and writes the storage (https://filesystem-spec.readthedocs.io). No torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mmcompress.data.remote_files import name_storage_errors, open_filesystem
from mmcompress.errors import DataError
from mmcompress.storage import InvalidValue, build_record, replace_folder, to_plain

STATE_FOLDER = "state"
"""Folder of the storage that holds the snapshot."""

SNAPSHOT_FORMAT = 1
"""Format of snapshots that this version writes and reads."""

MAX_RESTORES = 3
"""Times that a snapshot is read again which was replaced meanwhile."""

HASH_CHARACTERS = 40
"""Characters of the hash of a piece: 160 bits."""

SCRATCH_PIECE = ".piece"
"""Name of the file that a piece is fetched into."""

READ_BYTES = 1 << 20
"""Bytes of a file that are hashed at a time."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run folder at one moment. `state/snapshot.json`."""

    format: int = SNAPSHOT_FORMAT
    """The format of this record."""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    """What tells one snapshot from another."""
    files: dict[str, tuple[str, ...]]
    """The hashes of the pieces of each file, in order, by the path of the file in the folder."""
    empty_folders: tuple[str, ...] = ()
    """The paths of folders that hold nothing; an empty folder may tell something."""

    def holds_more_than(self, names: Collection[str]) -> bool:
        """Return whether there are files or folders of other names than these."""
        return any(path not in names for path in (*self.files, *self.empty_folders))

    def list_pieces(self) -> set[str]:
        """Return the hashes of all pieces."""
        return {piece for pieces in self.files.values() for piece in pieces}


class RunStorage:
    """The storage of one run folder.

    Args:
        url: Such as `s3://bucket/run`. Credentials come from where the storage's own tools look for
            them.

    Raises:
        MissingPackage: The package that reads this storage is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.filesystem = open_filesystem(url)
        self.root: str = self.filesystem._strip_protocol(self.url).rstrip("/")

    def locate(self, path: str) -> str:
        """Return the name of a file of the run in the storage."""
        return f"{self.root}/{path}"

    def read_json(self, path: str) -> dict[str, Any] | None:
        """Read a small file; None where there is none.

        Raises:
            DataError: The storage gives no answer, or the file is damaged.
        """
        with name_storage_errors(self.url, f"{path} can't be read"):
            try:
                text = self.filesystem.cat_file(self.locate(path))
            except FileNotFoundError:
                return None
            content = json.loads(text)
        if not isinstance(content, dict):
            raise DataError(f"{self.url}/{path}: damaged: expected a mapping")
        return content

    def write_json(self, path: str, content: Mapping[str, Any]) -> None:
        """Write a small file, whole or not at all. Raises `DataError` where it can't be written."""
        with name_storage_errors(self.url, f"{path} can't be written"):
            self.filesystem.pipe_file(self.locate(path), json.dumps(content).encode())

    def remove(self, path: str) -> None:
        """Remove a file, if it is there. Raises `DataError` where the storage gives no answer."""
        with name_storage_errors(self.url, f"{path} can't be removed"):
            try:
                self.filesystem.rm_file(self.locate(path))
            except FileNotFoundError:
                return

    def remove_folder(self, path: str) -> None:
        """Remove a folder with everything in it, if it is there."""
        with name_storage_errors(self.url, f"{path} can't be removed"):
            self.filesystem.invalidate_cache()
            if self.filesystem.exists(self.locate(path)):
                self.filesystem.rm(self.locate(path), recursive=True)

    def read_snapshot(self) -> Snapshot | None:
        """Read the last snapshot; None before the first one.

        Raises:
            DataError: The storage gives no answer, or the snapshot is damaged or of another format.
        """
        content = self.read_json(f"{STATE_FOLDER}/snapshot.json")
        if content is None:
            return None
        if content.get("format") != SNAPSHOT_FORMAT:
            raise DataError(
                f"{self.url}: a run of format {content.get('format')}; this version reads format "
                f"{SNAPSHOT_FORMAT}"
            )
        try:
            snapshot = build_record(Snapshot, content)
        except InvalidValue as error:
            raise DataError(f"{self.url}: the snapshot of the run is damaged: {error}") from error
        for path in (*snapshot.files, *snapshot.empty_folders):
            _require_inner_path(self.url, path)
        return snapshot

    def read_pieces(self, names: Iterable[str]) -> bytes | None:
        """Read the content of a small file; None where a piece of it is gone.

        Args:
            names: The hashes of its pieces, in order.

        Raises:
            DataError: The storage gives no answer.
        """
        parts: list[bytes] = []
        with name_storage_errors(self.url, "can't be read"):
            try:
                for name in names:
                    part = self.filesystem.cat_file(self.locate(f"{STATE_FOLDER}/pieces/{name}"))
                    parts.append(part)
            except FileNotFoundError:
                return None
        return b"".join(parts)

    def write_piece(self, name: str, content: Path | bytes) -> None:
        """Write a piece of a file, from a file or as it is."""
        target = self.locate(f"{STATE_FOLDER}/pieces/{name}")
        with name_storage_errors(self.url, "can't be written"):
            if isinstance(content, bytes):
                self.filesystem.pipe_file(target, content)
            else:
                self.filesystem.put_file(str(content), target)

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Write a snapshot whose pieces are all written; it takes the place of the one before."""
        self.write_json(f"{STATE_FOLDER}/snapshot.json", to_plain(snapshot))

    def remove_pieces(self, names: Iterable[str]) -> None:
        """Remove pieces that no snapshot needs any more."""
        for name in names:
            self.remove(f"{STATE_FOLDER}/pieces/{name}")

    def restore(self, snapshot: Snapshot, folder: Path) -> Snapshot:
        """Write the files of a snapshot into a folder, in place of what is in it.

        Args:
            snapshot: The snapshot. Where it is replaced meanwhile, the new one is taken.
            folder: The folder.

        Returns:
            The snapshot that was written.

        Raises:
            DataError: A piece is missing or damaged, or the storage gives no answer.
        """
        for _ in range(MAX_RESTORES):
            try:
                with replace_folder(folder) as unfinished:
                    self._fetch_files(snapshot, unfinished)
            except FileNotFoundError:
                newer = self.read_snapshot()
                if newer is None or newer.identity == snapshot.identity:
                    break
                snapshot = newer
            else:
                return snapshot
        raise DataError(f"{self.url}: pieces of the run are missing in {STATE_FOLDER}/pieces")

    def _fetch_files(self, snapshot: Snapshot, folder: Path) -> None:
        """Write the files of a snapshot. Raises `FileNotFoundError` where a piece is missing."""
        for path in snapshot.empty_folders:
            (folder / path).mkdir(parents=True, exist_ok=True)
        for path, pieces in snapshot.files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for piece in pieces:
                    self._append_piece(piece, file, scratch=folder / SCRATCH_PIECE)

    def _append_piece(self, name: str, file: BinaryIO, *, scratch: Path) -> None:
        """Write a piece to the end of an open file, by way of a file of its own.

        Raises:
            FileNotFoundError: It is missing.
            DataError: It is damaged, or the storage gives no answer.
        """
        is_there = True
        with name_storage_errors(self.url, "can't be read"):
            try:
                self.filesystem.get_file(self.locate(f"{STATE_FOLDER}/pieces/{name}"), str(scratch))
            except FileNotFoundError:
                is_there = False
        if not is_there:
            raise FileNotFoundError(name)
        if hash_file(scratch) != name:
            raise DataError(f"{self.url}: {STATE_FOLDER}/pieces/{name} is damaged")
        with scratch.open("rb") as content:
            shutil.copyfileobj(content, file)
        scratch.unlink()

    def publish(self, files: Mapping[str, Path]) -> None:
        """Write plain copies of files that people read; copies of earlier ones are removed.

        Args:
            files: The files by their paths in the run folder.
        """
        record = f"{STATE_FOLDER}/published.json"
        known = self.read_json(record) or {}
        published = {path: hash_file(file) for path, file in files.items()}
        for path, content_hash in published.items():
            if known.get(path) != content_hash:
                with name_storage_errors(self.url, f"{path} can't be written"):
                    self.filesystem.put_file(str(files[path]), self.locate(path))
        for path in known:
            if path not in published:
                self.remove(path)
        self.write_json(record, published)


def hash_bytes(content: bytes) -> str:
    """Return the name of a piece with this content."""
    return hashlib.sha256(content).hexdigest()[:HASH_CHARACTERS]


def hash_file(path: Path) -> str:
    """Return the name of a piece with the content of a file."""
    content_hash = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            content_hash.update(block)
    return content_hash.hexdigest()[:HASH_CHARACTERS]


def _require_inner_path(url: str, path: str) -> None:
    """Raise `DataError` where a path leads out of the run folder."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{url}: the path '{path}' leads out of the run folder")
