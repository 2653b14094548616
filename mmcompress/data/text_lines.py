"""`text_lines`: the user's own texts, one a line, for a pipeline that reads a text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from mmcompress.data.base import Pairs
from mmcompress.data.text_files import split_lines
from mmcompress.errors import DataError
from mmcompress.storage import read_text_file

LINE_TRAIN_SHARE = 0.7
"""Share of the lines for training."""

LINE_TRAIN_AND_VALIDATION_SHARE = 0.85
"""The same for training and validation together; the rest is for the test."""


@dataclass(frozen=True, kw_only=True)
class TextLines:
    """A UTF-8 file with one text a line; blank lines and repeated ones do not count.

    A line goes to a split by a hash of its text: 70 % train, 15 % val, 15 % test. It stays there
    when others are added.
    """

    path: str
    """The file."""
    seed: int = 0
    """Which lines go to which split."""
    splits: tuple[str, ...] = field(default=("train", "val", "test"), init=False)
    """Names of the splits."""
    modality: str = field(default="text", init=False)
    """What the inputs are."""

    def count_pairs(self) -> dict[str, int]:
        """Count the lines in each split."""
        return {split: len(lines) for split, lines in _read_lines(self).items()}

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Load lines of a split; each is its own reference text.

        Args:
            split: `train`, `val` or `test`.
            count: The most lines, drawn by `seed`; None loads all of them in the file's order.
            seed: Which lines are drawn.

        Raises:
            DataError: There is no such split, or the file can't be read.
        """
        if split not in self.splits:
            raise DataError(f"text_lines: no split '{split}' (known: {', '.join(self.splits)})")
        lines = _read_lines(self)[split]
        if count is not None:
            order = np.random.default_rng([self.seed, seed]).permutation(len(lines))
            lines = [lines[i] for i in order[:count]]
        return Pairs(inputs=tuple(lines), texts=tuple(lines))

    def assign_split(self, text: str) -> str:
        """Return the split of a line."""
        digest = hashlib.blake2b(f"{self.seed}:{text}".encode(), digest_size=2).digest()
        position = int.from_bytes(digest, "big") / 65536
        if position < LINE_TRAIN_SHARE:
            return "train"
        return "val" if position < LINE_TRAIN_AND_VALIDATION_SHARE else "test"


@lru_cache(maxsize=4)
def _read_lines(data: TextLines) -> dict[str, list[str]]:
    """Return the lines of every split, or raise `DataError`."""
    path = Path(data.path)
    lines = split_lines(read_text_file(path))
    lines_by_split: dict[str, list[str]] = {split: [] for split in data.splits}
    for line in dict.fromkeys(line.strip() for line in lines):
        if line:
            lines_by_split[data.assign_split(line)].append(line)
    empty = [split for split, lines in lines_by_split.items() if not lines]
    if empty:
        raise DataError(f"{path}: no line in split {', '.join(empty)}: add lines")
    return lines_by_split
