"""What a generator wrote of a request, so that another one can be made to do the same work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmcompress.runtime.beam_search import BeamMove


@dataclass(frozen=True, kw_only=True)
class GenerationTrace:
    """What a generator wrote of one context."""

    steps: int
    """Calls of its model."""
    sequences: tuple[tuple[float, tuple[int, ...]], ...]
    """Mean log-probability of a token, and token ids with prompt and end; the best sequence
    first."""
    moves: tuple[BeamMove, ...] = ()
    """Moves of its beams between the calls. Empty: only the number of calls is repeated."""


class TextWriter(Protocol):
    """A deployed node that writes text: it says what it wrote, and can repeat the work."""

    traces: list[GenerationTrace]
    """What it wrote in the last call, of each context."""
    replay: Sequence[GenerationTrace]
    """Traces whose work the next calls repeat. Empty: it writes freely."""
