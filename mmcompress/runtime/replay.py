"""What a generator wrote of a request, so that another one can be made to do the same work."""

from __future__ import annotations

from dataclasses import dataclass

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
