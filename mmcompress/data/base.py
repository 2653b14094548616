"""What every kind of data gives: named splits of inputs with their reference texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from mmcompress.errors import DataError

Row = tuple[Path, str]
"""An input file and its reference text."""

RowsBySplit = dict[str, list[Row]]
"""All rows of a dataset, by name of the split."""

MAX_LISTED_PROBLEMS = 10
"""Problems that an error message lists, so that it fits on a screen."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Inputs of a pipeline and their reference texts."""

    inputs: Sequence[Any]
    """Images, uint8 [H, W, 3], sounds, float32 [n] at 16 kHz, or texts. A file may be read only
    when its item is asked for."""
    texts: tuple[str, ...]
    """One reference text per input."""
    names: tuple[str, ...] = ()
    """One name per input, where the inputs are files. A file has the same name in every run."""
    files: tuple[Path, ...] = ()
    """The file of each input, where the inputs are files. What checks how they are decoded opens
    these itself."""
    generated_texts: tuple[str, ...] = ()
    """What the generator of the dense pipeline writes for each input. Where it is given, other
    pipelines are judged by it in place of `texts`."""

    def __len__(self) -> int:
        return len(self.texts)


def join_pairs(chosen: Sequence[tuple[Pairs, int]]) -> Pairs:
    """Put some pairs of several loads together.

    Args:
        chosen: (pairs, place in them) of every pair.
    """
    inputs: list[Any] = []
    texts: list[str] = []
    names: list[str] = []
    files: list[Path] = []
    generated_texts: list[str] = []
    for pairs, place in chosen:
        inputs.append(pairs.inputs[place])
        texts.append(pairs.texts[place])
        names.extend(pairs.names[place : place + 1])
        files.extend(pairs.files[place : place + 1])
        generated_texts.extend(pairs.generated_texts[place : place + 1])
    return Pairs(
        inputs=inputs,
        texts=tuple(texts),
        names=tuple(names),
        files=tuple(files),
        generated_texts=tuple(generated_texts),
    )


class Dataset(Protocol):
    """One kind of data. The fields of the frozen dataclass that implements it are its options.

    A dataset of limited size also has `count_pairs() -> dict[str, int]`, the pairs in each split.
    """

    splits: tuple[str, ...]
    """Names of the splits: `train`, `val`, `test`, and further ones that a spec may report."""
    modality: str
    """What the inputs are: a name in the registry `INPUT_TYPES`."""

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Load pairs of a split, the same ones for the same arguments.

        Args:
            split: One of `splits`.
            count: The most pairs to load; None leaves the number to the dataset.
            seed: Which pairs are drawn.

        Raises:
            DataError: There is no such split, or the data can't be read.
        """
        ...


def count_available(data: Dataset, split: str, *, wanted: int) -> int:
    """Return how many pairs of a split there are, at most as many as are wanted.

    Args:
        data: The dataset. One without `count_pairs` draws as many as it is asked for.
        split: The split.
        wanted: Pairs that are asked for.
    """
    count_pairs = getattr(data, "count_pairs", None)
    if count_pairs is None:
        return wanted
    counts: dict[str, int] = count_pairs()
    return min(counts.get(split, wanted), wanted)


class LazySequence(Sequence[np.ndarray]):
    """Arrays that are read from their files each time an item is asked for.

    Args:
        paths: One file per item.
        read: Reads one file.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], np.ndarray]):
        self.paths = paths
        self.read = read

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> LazySequence: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | LazySequence:
        if isinstance(index, slice):
            return LazySequence(self.paths[index], self.read)
        return self.read(self.paths[index])


def draw_rows(rows: list[Row], count: int | None, *, seeds: list[int]) -> list[Row]:
    """Draw rows at random, such that a smaller draw is the beginning of a larger one.

    Args:
        rows: All rows of a split.
        count: The most rows to draw; None returns all of them in order.
        seeds: What the order depends on.
    """
    if count is None:
        return rows
    order = np.random.default_rng(seeds).permutation(len(rows))
    return [rows[i] for i in order[:count]]


def identify_file(path: Path) -> Path:
    """Return one path for a file, however a list names it: by `./`, `..` or a link.

    A path that no file can have stays as it is: who opens it says so.
    """
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
        return path


def refuse_rows(problems: Sequence[str], noun: str) -> None:
    """Raise an error that lists problems with rows, if there are any.

    Args:
        problems: One sentence per row that can't be used.
        noun: What the rows name, in the plural.

    Raises:
        DataError: There is a problem.
    """
    if not problems:
        return
    count = f"1 {noun.removesuffix('s')}" if len(problems) == 1 else f"{len(problems)} {noun}"
    lines = [f"{count} can't be used:", *problems[:MAX_LISTED_PROBLEMS]]
    if len(problems) > MAX_LISTED_PROBLEMS:
        lines.append(f"... and {len(problems) - MAX_LISTED_PROBLEMS} more")
    lines.append("put the files in order, or take their rows out")
    raise DataError("\n  ".join(lines))
