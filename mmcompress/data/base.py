"""What every dataset kind modality: named splits of (input, text) pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mmcompress.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Inputs of a pipeline and their reference texts; `inputs[i]` may be read from disk only when asked for.

    An image is uint8 [H, W, 3], a sound float32 [n] at 16 kHz.
    """

    inputs: Sequence[np.ndarray]
    texts: tuple[str, ...]
    names: tuple[str, ...] = ()
    """Of the files, where the inputs are files."""
    generated_texts: tuple[str, ...] = ()
    """What the dense pipeline's generator makes of the inputs; generators are judged by it where it is given."""

    def __len__(self) -> int:
        return len(self.texts)


class Dataset(Protocol):
    """One dataset kind. Options are the fields of the frozen dataclass that implements it."""

    splits: tuple[str, ...]
    modality: Literal["image", "audio"]
    """What its inputs are."""

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """At most `count` pairs of `split`, the same ones for the same arguments. Raises `DataError`."""
        ...


class LazySequence(Sequence):
    """Files read when asked for."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], np.ndarray]):
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: Any) -> Any:
        return self.read(self.paths[i])


def draw_rows(
    rows: list[tuple[Path, str]], count: int | None, *, seeds: list[int]
) -> list[tuple[Path, str]]:
    """`count` rows drawn by seed, the first ones of any larger draw; all of them in order without a count."""
    if count is None:
        return rows
    return [rows[i] for i in np.random.default_rng(seeds).permutation(len(rows))[:count]]


def refuse_rows(problems: Sequence[str], what: str) -> None:
    """Raise `DataError` with the first of the problems, if there are any."""
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            f"{len(problems)} {what} can't be used:\n  " + "\n  ".join(problems[:10]) + more
        )
