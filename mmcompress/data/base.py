"""What every dataset kind gives: named splits of (image, caption) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """Image and caption pairs; `images[i]` is uint8 [H, W, 3] and may be read from disk only when asked for."""

    images: Sequence[np.ndarray]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)


class Dataset(Protocol):
    """One dataset kind. Options are the fields of the frozen dataclass that implements it."""

    splits: tuple[str, ...]

    def load(self, split: str, count: int | None = None, seed: int = 0) -> Pairs:
        """At most `count` pairs of `split`, the same ones for the same arguments. Raises `DataError`."""
        ...
