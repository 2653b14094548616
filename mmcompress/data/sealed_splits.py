"""Keeps the test split closed until a finished artifact is judged on it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmcompress.data.base import Dataset, Pairs
from mmcompress.errors import SplitSealed

CHOOSING_SPLITS = ("train", "val")
"""Splits that everything is trained and chosen on. Every other split only judges, so it is sealed:
a choice that saw it would make the reported quality too good."""


class SplitSeal:
    """Says whether the judging splits may be loaded now. One seal serves all views of a dataset."""

    def __init__(self) -> None:
        self.is_open = False
        """Whether a finished artifact is being judged."""

    @contextmanager
    def open_for_judging(self) -> Iterator[None]:
        """Open the judging splits for the block. They are sealed again at its end."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False


class SealedData:
    """A dataset that refuses the test split, and all others that judge, while its seal is closed.

    Args:
        data: The dataset.
        seal: Opened by the final evaluation alone.
    """

    def __init__(self, data: Dataset, seal: SplitSeal):
        self.splits = data.splits
        # A plug-in of an earlier version may not say what it gives: those were all images.
        self.modality: str = getattr(data, "modality", "image")
        self._data = data
        self._seal = seal

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Load pairs as the dataset does.

        Raises:
            SplitSealed: The split judges finished artifacts, and none is being judged.
        """
        if split not in CHOOSING_SPLITS and not self._seal.is_open:
            raise SplitSealed(
                f"data: the split '{split}' is sealed until a finished artifact is judged on it: "
                f"what trains, measures or chooses takes {' and '.join(CHOOSING_SPLITS)}"
            )
        return self._data.load(split, count, seed=seed)

    def count_pairs(self) -> dict[str, int]:
        """Count the pairs of every split whose number is known. They are not loaded."""
        count = getattr(self._data, "count_pairs", None)
        if count is not None:
            known_counts: dict[str, int] = count()
            return known_counts
        counts = {split: getattr(self._data, split, None) for split in self.splits}
        return {split: count for split, count in counts.items() if isinstance(count, int)}
