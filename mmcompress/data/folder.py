"""`folder`: the user's own images and captions, named by a JSONL or CSV file in the folder."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from mmcompress.data.base import (
    LazySequence,
    Pairs,
    RowsBySplit,
    draw_rows,
    identify_file,
    refuse_rows,
)
from mmcompress.data.text_files import Fields, check_characters, read_csv_rows, read_jsonl_rows
from mmcompress.errors import DataError
from mmcompress.runtime.images import open_image
from mmcompress.runtime.similar_folder import suggest_folder

LISTING_NAMES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
"""Files that may list the images; the first that is there is read."""

LISTING_EXAMPLE = '{"image": "a.jpg", "caption": "a red bicycle"}'
"""A line of a list, for a person who has none."""

IMAGE_KEYS = ("image", "file_name", "filename", "file", "path")
"""Names that the field with the image may have, the preferred one first."""

CAPTION_KEYS = ("caption", "text")
"""Names that the field with the caption may have, the preferred one first."""

IMAGE_TRAIN_SHARE = 0.8
"""Share of the images without a split of their own that are for training."""

IMAGE_TRAIN_AND_VALIDATION_SHARE = 0.9
"""The same for training and validation together; the rest is for the test."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Images and captions of a folder.

    Its list has one row per image with `image` (relative to the folder) and `caption`, and
    optionally `split`. Every image is opened once when the folder is loaded, and one error lists
    all that are missing or broken. Lists are UTF-8. A text of a CSV file stands in double quotes
    where it has a comma or a line break.
    """

    path: str
    """The folder."""
    file: str | None = None
    """The list, relative to the folder. Without it, the first of captions.jsonl, metadata.jsonl,
    captions.csv and metadata.csv is taken."""
    split_seed: int = 0
    """Which images without a split of their own go to which split."""
    repeats: Literal["refuse", "first"] = "refuse"
    """What becomes of an image in several rows. It would count as several images wherever right
    answers are counted, so it is refused; `first` reads its first caption only."""
    old_options: ClassVar[Mapping[str, str]] = {"seed": "split_seed"}
    """Options of version 0.1 and what they are called now."""
    splits: tuple[str, ...] = field(default=("train", "val", "test"), init=False)
    """Names of the splits."""
    modality: str = field(default="image", init=False)
    """What the inputs are."""

    def count_pairs(self) -> dict[str, int]:
        """Count the pairs in each split."""
        return {split: len(rows) for split, rows in _read_pairs(self).items()}

    def assign_split(self, image_name: str) -> str:
        """Return the split of an image by a hash of its name: 80 % train, 10 % val, 10 % test.

        An image stays in its split when others are added. Its name is that of its file. Where
        files in several folders share that name, it is the path within the data folder. Otherwise
        `sku1/main.jpg` and `sku2/main.jpg` would share a split as well.
        """
        key = f"{self.split_seed}:{image_name}".encode()
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
        rows = draw_rows(_read_pairs(self)[split], count, seeds=[self.split_seed, seed])
        images = [image for image, _ in rows]
        captions = [caption for _, caption in rows]
        # relative paths: two folders inside may each hold a 1.jpg
        names = [os.path.relpath(image, self.path) for image in images]
        return Pairs(
            inputs=LazySequence(images, _read_pixels),
            texts=tuple(captions),
            names=tuple(names),
            files=tuple(images),
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
    rows = _read_rows(listing)
    shared_names = _find_shared_names(root, rows)
    for line_number, fields in rows:
        place = f"{listing}:{line_number}"
        image = root / _read_field(fields, IMAGE_KEYS, place=place)
        caption = _read_field(fields, CAPTION_KEYS, place=place)
        identity = identify_file(image)
        if identity in line_by_image:
            if folder.repeats == "refuse":
                problems.append(
                    f"{place}: {image.name} stands in line {line_by_image[identity]} already"
                    " (repeats: first reads that one)"
                )
            continue
        line_by_image[identity] = line_number
        name = image.name
        if name in shared_names:
            name = Path(os.path.relpath(image, root)).as_posix()
        split = fields.get("split") or folder.assign_split(name)
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


def _find_listing(root: Path, file_name: str | None) -> Path:
    """Return the file that lists the images of a folder, or raise `DataError`."""
    if not root.is_dir():
        raise DataError(f"data.options.path: '{root}': no such folder{suggest_folder(root)}")
    names = (file_name,) if file_name else LISTING_NAMES
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(
        f"data.options.path: '{root}': none of {', '.join(names)} is in it; such a file lists the "
        f"images, a line each: {LISTING_EXAMPLE}"
    )


def _read_rows(listing: Path) -> list[tuple[int, Fields]]:
    """Return (line, fields) of every row of a JSONL or CSV file, or raise `DataError`."""
    if listing.suffix.lower() == ".csv":
        return read_csv_rows(listing)
    return read_jsonl_rows(listing)


def _find_shared_names(root: Path, rows: list[tuple[int, Fields]]) -> frozenset[str]:
    """Return the file names that images in several folders share."""
    images: set[Path] = set()
    for _, fields in rows:
        values = [fields.get(key) for key in IMAGE_KEYS]
        texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
        if texts:
            images.add(Path(os.path.normpath(root / texts[0])))
    counts = Counter(image.name for image in images)
    return frozenset(name for name, count in counts.items() if count > 1)


def _read_field(fields: Fields, keys: tuple[str, ...], *, place: str) -> str:
    """Return the text of the first key that has one, or raise `DataError`."""
    for key in keys:
        value = fields.get(key)
        if isinstance(value, str) and value.strip():
            check_characters(value, place=place)
            return value.strip()
        if isinstance(value, list):
            raise DataError(f"{place}: '{key}' is a list; one {keys[0]} a row is what is read")
    for key in keys:
        if isinstance(fields.get(key), str):
            raise DataError(f"{place}: '{key}' is empty: fill it in, or take the row out")
    names = [str(key) for key in fields]
    cure = ""
    if any(";" in name for name in names):
        cure = "; columns are separated by commas: save it with commas in place of semicolons"
    raise DataError(
        f"{place}: no '{keys[0]}' (accepted names: {', '.join(keys)}; "
        f"found: {', '.join(names)}){cure}"
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
