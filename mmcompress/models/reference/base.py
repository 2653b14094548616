"""What a library itself answers to a raw input: the other side of the proof `dense == library`.

Nothing here is shared with the models, the preprocessing or the pooling of this package. A fault
there would otherwise stand on both sides of the proof.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LibraryAnswer:
    """What the library makes of one raw input."""

    prepared: np.ndarray
    """What its processor or tokenizer gives the model: pixels [3, h, w], features [m, f], or token
    ids [t] without padding."""
    embedding: np.ndarray | None = None
    """The embedding [d], of length 1; None where the model has none of its own."""


@dataclass(frozen=True, kw_only=True)
class WritingLimits:
    """What a spec chooses of the writing of a text."""

    beams: int
    """Sequences that are followed at once."""
    max_tokens: int
    """Tokens of the longest text, with those that it starts from."""
    lead_tokens: int
    """Tokens that every text starts from."""


class LibraryReference(ABC):
    """One model of a library, used as the library's documentation uses it."""

    @abstractmethod
    def answer(self, raw: object) -> LibraryAnswer:
        """Answer one raw input: a picture, samples at 16 kHz, or a text."""

    def write(self, raw: object, limits: WritingLimits) -> list[int] | None:
        """Return the token ids that the library's `generate` writes for a raw input.

        Args:
            raw: The raw input of the whole model.
            limits: What the spec chooses, and not the checkpoint.

        Returns:
            The ids of the best text; None where the model writes nothing.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest:
    """The model that a reference is opened for."""

    location: str
    """A folder, or a name at the hub."""
    pretrained: str | None = None
    """open_clip's tag of the weights, or a file of them."""
    max_tokens: int = 0
    """Tokens at most that the spec lets a text encoder read; 0 leaves it to the library."""


def normalize(vector: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return a vector with length 1, float64."""
    array = np.asarray(vector, np.float64).reshape(-1)
    return array / max(float(np.linalg.norm(array)), 1e-12)
