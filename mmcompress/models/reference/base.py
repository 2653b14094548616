"""What a library itself answers to a raw input: the other side of the proof `dense == library`.

Nothing here is shared with the models, the preprocessing or the pooling of this package. A fault
there would otherwise stand on both sides of the proof.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
class MatchAnswer:
    """What the library makes of a picture and a text together."""

    prepared: np.ndarray
    """Token ids [t] of the text."""
    embedding: np.ndarray
    """The first token [d], with length 1."""
    match: float
    """Probability that the text describes the picture, 0..1."""


@dataclass(frozen=True, kw_only=True)
class WritingRequest:
    """What a spec chooses of the writing of a text. The rest is the checkpoint's own choice."""

    beams: int
    """Sequences that are followed at once."""
    max_tokens: int
    """Tokens of the longest text, with those that it starts from; 0 leaves it to the library."""
    start: tuple[int, ...]
    """Token ids that the bundle starts from. A library counts the length from there; it chooses its
    own start."""
    prompt: str = ""
    """What the generator reads before it writes."""
    language: str = ""
    """The language that it writes, if it knows several."""
    task: str = ""
    """What it does with speech, if it knows several tasks."""


class LibraryReference(ABC):
    """One model of a library, used as the library's documentation uses it."""

    @abstractmethod
    def answer(self, raw: object) -> LibraryAnswer:
        """Answer one raw input: a picture, samples at 16 kHz, or a text."""

    def compute_tokens(self, raw: object) -> np.ndarray | None:
        """Return the vectors [n, w] of the last layer, which the generator of another checkpoint
        reads; None where the model has none."""
        return None


@runtime_checkable
class LibraryWriter(Protocol):
    """A library's own way from a raw input, or from the vectors of an encoder, to a text."""

    def write(self, raw: object, request: WritingRequest) -> list[int] | None:
        """Return the ids of the best text that the library's `generate` writes.

        Args:
            raw: The raw input of the whole model; vectors [n, w] for a decoder alone.
            request: What the spec chooses, and not the checkpoint.

        Returns:
            Ids with those that the text starts from and the end. Words ahead of a picture are left
            out. None where the library does not write in such a way.
        """
        ...

    def compute_logits(
        self, raw: object, *, ids: Sequence[int], request: WritingRequest
    ) -> np.ndarray:
        """Return the logits [v] of the token behind a text.

        Args:
            raw: The same as in `write`.
            ids: The text so far, as `write` returns it.
            request: The same as in `write`.
        """
        ...


@runtime_checkable
class LibraryMatcher(Protocol):
    """A library's own model that reads a picture and a text together."""

    def match(self, picture: object, text: str) -> MatchAnswer:
        """Tell how well a text describes a picture."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest:
    """The model that a reference is opened for."""

    location: str
    """A folder, or a name at the hub."""
    pretrained: str | None = None
    """open_clip's tag of the weights, or a file of them."""
    revision: str = ""
    """The commit of the weights behind a tag; empty for the hub's main branch."""
    max_tokens: int = 0
    """Tokens at most that the spec lets a text encoder read; 0 leaves it to the library."""


def normalize(vector: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return a vector with length 1, float64."""
    array = np.asarray(vector, np.float64).reshape(-1)
    return array / max(float(np.linalg.norm(array)), 1e-12)
