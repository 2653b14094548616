"""`folder`: the user's own images and captions, named by a JSONL or CSV file in the folder."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mmcompress.data.base import LazySequence, Pairs, draw_rows, refuse_rows
from mmcompress.errors import DataError
from mmcompress.runtime.images import open_image

NAMES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")


IMAGE_KEYS, CAPTION_KEYS = ("image", "file_name", "file", "path"), ("caption", "text")


def _rows(path: Path) -> list[tuple[int, dict]]:
    """(line, row) of a JSONL or CSV file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: can't be read: {e}") from e
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        return [(reader.line_num, row) for row in reader]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise DataError(f"{path}:{number}: not a JSON object: {e}") from e
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {row!r}")
        rows.append((number, row))
    return rows


def _field(row: dict, keys: tuple[str, ...], *, where: str) -> str:
    for key in keys:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, list):
            raise DataError(f"{where}: '{key}' is a list; one {keys[0]} a row is what is read")
    raise DataError(
        f"{where}: no '{keys[0]}' (accepted names: {', '.join(keys)}; found: {', '.join(map(str, row))})"
    )


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Images and captions of a folder.

    `file` (default: the first of captions.jsonl, metadata.jsonl, captions.csv, metadata.csv) has one row per image
    with `image` (relative to the folder) and `caption`, and optionally `split`. Rows without a split are dealt by a
    hash of the image name: 80 % train, 10 % val, 10 % test. Every image is opened once when the folder is loaded, so
    a missing or broken one is told at once, all of them together. An image with several captions would be several
    images to whatever counts what is right: it is refused, or with `repeats: first` its first caption alone is read.
    """

    path: str
    file: str | None = None
    seed: int = 0
    repeats: Literal["refuse", "first"] = "refuse"
    splits: tuple[str, ...] = field(default=("train", "val", "test"), init=False)
    modality: Literal["image"] = field(default="image", init=False)

    def pairs(self) -> dict[str, list[tuple[Path, str]]]:
        """(image, caption) by split. Raises `DataError` listing what is missing or broken."""
        root = Path(self.path)
        if not root.is_dir():
            raise DataError(f"data folder '{root}': no such folder")
        names = (self.file,) if self.file else NAMES
        listing = next((root / n for n in names if (root / n).is_file()), None)
        if listing is None:
            raise DataError(f"data folder '{root}': none of {', '.join(names)} is in it")
        found: dict[str, list[tuple[Path, str]]] = {s: [] for s in self.splits}
        seen: dict[Path, int] = {}
        problems = []
        for line, row in _rows(listing):
            where = f"{listing}:{line}"
            image, text = (
                root / _field(row, IMAGE_KEYS, where=where),
                _field(row, CAPTION_KEYS, where=where),
            )
            if (first := seen.setdefault(image, line)) != line:
                if self.repeats == "refuse":
                    problems.append(
                        f"{where}: {image.name} stands in line {first} already (repeats: first reads that one)"
                    )
                continue
            split = row.get("split") or self.deal(image.name)
            if split not in found:
                raise DataError(f"{where}: unknown split '{split}' (known: {', '.join(found)})")
            try:
                open_image(image)
            except DataError as e:
                problems.append(f"{where}: {e}")
                continue
            found[split].append((image, text))
        refuse_rows(problems, "images")
        if empty := [s for s, rows in found.items() if not rows]:
            have = ", ".join(f"{len(rows)} in {s}" for s, rows in found.items())
            raise DataError(
                f"{listing}: no pair in split {', '.join(empty)} ({have}); add images, or name the split of each row"
            )
        return found

    def deal(self, name: str) -> str:
        share = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=2).digest()
        place = int.from_bytes(share, "big") / 65536
        return "train" if place < 0.8 else "val" if place < 0.9 else "test"

    def count_pairs(self) -> dict[str, int]:
        """Pairs in each split."""
        return {s: len(rows) for s, rows in _cached(self).items()}

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Up to `count` pairs of a split, drawn by seed; all of them in file order without a count."""
        rows = _cached(self)[split] if split in self.splits else None
        if rows is None:
            raise DataError(f"folder: no split '{split}' (known: {', '.join(self.splits)})")
        rows = draw_rows(rows, count, seeds=[self.seed, seed])
        names = tuple(
            os.path.relpath(p, self.path) for p, _ in rows
        )  # two folders may each hold a 1.jpg
        return Pairs(
            inputs=LazySequence([p for p, _ in rows], _pixels),
            texts=tuple(c for _, c in rows),
            names=names,
        )


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(open_image(path))


_memory: dict[Folder, dict[str, list[tuple[Path, str]]]] = {}


def _cached(folder: Folder) -> dict[str, list[tuple[Path, str]]]:
    if folder not in _memory:
        _memory[folder] = folder.pairs()
    return _memory[folder]
