"""`folder`: the user's own images and captions, named by a JSONL or CSV file in the folder."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from mmcompress.data.base import (
    LazySequence,
    Pairs,
    RowsBySplit,
    draw_rows,
    read_text_file,
    refuse_rows,
    split_lines,
)
from mmcompress.errors import DataError
from mmcompress.runtime.images import open_image

LISTING_NAMES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
"""Files that may list the images; the first that is there is read."""

IMAGE_KEYS = ("image", "file_name", "file", "path")
"""Names that the field with the image may have, the preferred one first."""

CAPTION_KEYS = ("caption", "text")
"""Names that the field with the caption may have, the preferred one first."""

MAX_FIELD_CHARACTERS = 10_000_000
"""Characters of a field of a CSV file: Python's own limit of 131,072 is less than a long text."""

EXTRA_FIELDS = "more fields"
"""Key of the fields of a CSV row that no name of its first line stands for."""

IMAGE_TRAIN_SHARE = 0.8
"""Share of the images without a split of their own that are for training."""

IMAGE_TRAIN_AND_VALIDATION_SHARE = 0.9
"""The same for training and validation together; the rest is for the test."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Images and captions of a folder.

    Its list has one row per image with `image` (relative to the folder) and `caption`, and
    optionally `split`. Every image is opened once when the folder is loaded, and one error lists
    all that are missing or broken.
    """

    path: str
    """The folder."""
    file: str | None = None
    """The list, relative to the folder. None takes the first of captions.jsonl, metadata.jsonl,
    captions.csv and metadata.csv."""
    seed: int = 0
    """Which images without a split of their own go to which split."""
    repeats: Literal["refuse", "first"] = "refuse"
    """What becomes of an image in several rows. It would count as several images wherever right
    answers are counted, so it is refused; `first` reads its first caption only."""
    splits: tuple[str, ...] = field(default=("train", "val", "test"), init=False)
    """Names of the splits."""
    modality: Literal["image"] = field(default="image", init=False)
    """What the inputs are."""

    def count_pairs(self) -> dict[str, int]:
        """Count the pairs in each split."""
        return {split: len(rows) for split, rows in _read_pairs(self).items()}

    def assign_split(self, image_name: str) -> str:
        """Return the split of an image by a hash of its name: 80 % train, 10 % val, 10 % test.

        An image stays in its split when others are added.
        """
        key = f"{self.seed}:{image_name}".encode()
        digest = hashlib.blake2b(key, digest_size=2).digest()
        position = int.from_bytes(digest, "big") / 65536
        if position < IMAGE_TRAIN_SHARE:
            return "train"
        if position < IMAGE_TRAIN_AND_VALIDATION_SHARE:
            return "val"
        return "test"

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Load pairs of a split; an image is read when its item is asked for.

        Args:
            split: `train`, `val` or `test`.
            count: The most pairs, drawn by `seed`; None loads all of them in the list's order.
            seed: Which pairs are drawn.

        Raises:
            DataError: There is no such split, or the folder can't be read.
        """
        if split not in self.splits:
            raise DataError(f"folder: no split '{split}' (known: {', '.join(self.splits)})")
        rows = draw_rows(_read_pairs(self)[split], count, seeds=[self.seed, seed])
        return Pairs(
            inputs=LazySequence([image for image, _ in rows], _read_pixels),
            texts=tuple(caption for _, caption in rows),
            # relative paths: two folders inside may each hold a 1.jpg
            names=tuple(os.path.relpath(image, self.path) for image, _ in rows),
        )


def _read_pixels(path: Path) -> np.ndarray:
    """Return an image as uint8 [H, W, 3]."""
    return np.asarray(open_image(path))


@lru_cache(maxsize=4)
def _read_pairs(folder: Folder) -> RowsBySplit:
    """Read all (image, caption) by split, or raise `DataError` with all problems."""
    root = Path(folder.path)
    listing = _find_listing(root, folder.file)
    rows_by_split: RowsBySplit = {split: [] for split in folder.splits}
    line_by_image: dict[Path, int] = {}
    problems: list[str] = []
    listed_rows = _read_rows(listing)
    dealt_names = _list_dealt_names(root, listed_rows)
    for line_number, fields in listed_rows:
        place = f"{listing}:{line_number}"
        image = root / _read_field(fields, IMAGE_KEYS, place=place)
        caption = _read_field(fields, CAPTION_KEYS, place=place)
        if image in line_by_image:
            if folder.repeats == "refuse":
                problems.append(
                    f"{place}: {image.name} stands in line {line_by_image[image]} already"
                    " (repeats: first reads that one)"
                )
            continue
        line_by_image[image] = line_number
        split = fields.get("split") or folder.assign_split(dealt_names[image])
        if not isinstance(split, str) or split not in rows_by_split:
            raise DataError(f"{place}: unknown split '{split}' (known: {', '.join(rows_by_split)})")
        try:
            open_image(image)
        except DataError as error:
            problems.append(f"{place}: {error}")
            continue
        rows_by_split[split].append((image, caption))
    refuse_rows(problems, "images")
    _refuse_empty_splits(rows_by_split, listing)
    return rows_by_split


def _list_dealt_names(
    root: Path, rows: Sequence[tuple[int, Mapping[str, object]]]
) -> dict[Path, str]:
    """Return the name that each image is dealt to a split by.

    It is the file name; where several images share one (`sku1/main.jpg`, `sku2/main.jpg`), it is
    the path in the folder. They would all land in one split.
    """
    images: list[Path] = []
    for _, fields in rows:
        for key in IMAGE_KEYS:
            value = fields.get(key)
            if isinstance(value, str) and value.strip():
                images.append(root / value.strip())
                break
    counts = Counter(image.name for image in set(images))
    names: dict[Path, str] = {}
    for image in images:
        is_shared = counts[image.name] > 1
        names[image] = os.path.relpath(image, root) if is_shared else image.name
    return names


def _find_listing(root: Path, file_name: str | None) -> Path:
    """Return the file that lists the images of a folder, or raise `DataError`."""
    if not root.is_dir():
        raise DataError(f"data folder '{root}': no such folder")
    names = (file_name,) if file_name else LISTING_NAMES
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(f"data folder '{root}': none of {', '.join(names)} is in it")


def _read_rows(listing: Path) -> list[tuple[int, Mapping[str, object]]]:
    """Return (line, fields) of every row of a JSONL or CSV file, or raise `DataError`."""
    text = read_text_file(listing)
    if listing.suffix == ".csv":
        return _read_csv_rows(text, listing)
    rows: list[tuple[int, Mapping[str, object]]] = []
    for line_number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DataError(f"{listing}:{line_number}: not a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{listing}:{line_number}: expected a JSON object, got {fields!r}")
        rows.append((line_number, fields))
    return rows


def _read_csv_rows(text: str, listing: Path) -> list[tuple[int, Mapping[str, object]]]:
    """Return (line, fields) of every row of a CSV text, or raise `DataError`."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=EXTRA_FIELDS, strict=True)
    rows: list[tuple[int, Mapping[str, object]]] = []
    try:
        for fields in reader:
            place = f"{listing}:{reader.line_num}"
            if EXTRA_FIELDS in fields:
                names = ", ".join(reader.fieldnames or ())
                raise DataError(
                    f"{place}: more fields than names ({names}): put a text with commas in quotes"
                )
            if None in fields.values():
                missing = ", ".join(name for name, value in fields.items() if value is None)
                raise DataError(f"{place}: too few fields, nothing for: {missing}")
            rows.append((reader.line_num, fields))
    except csv.Error as error:
        raise DataError(f"{listing}:{reader.line_num}: no CSV: {error}") from error
    return rows


def _read_field(fields: Mapping[str, object], keys: tuple[str, ...], *, place: str) -> str:
    """Return the text of the first key that has one, or raise `DataError`."""
    for key in keys:
        value = fields.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, list):
            raise DataError(f"{place}: '{key}' is a list; one {keys[0]} a row is what is read")
    present_keys = ", ".join(str(key) for key in fields)
    raise DataError(
        f"{place}: no '{keys[0]}' (accepted names: {', '.join(keys)}; found: {present_keys})"
    )


def _refuse_empty_splits(rows_by_split: RowsBySplit, listing: Path) -> None:
    """Raise `DataError` when a split has no pair."""
    empty_splits = [split for split, rows in rows_by_split.items() if not rows]
    if not empty_splits:
        return
    counts = ", ".join(f"{len(rows)} in {split}" for split, rows in rows_by_split.items())
    raise DataError(
        f"{listing}: no pair in split {', '.join(empty_splits)} ({counts});"
        " add images, or name the split of each row"
    )
