"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from mmcompress.runtime.beam_search import BeamMove


@dataclass(frozen=True, kw_only=True)
class GenerationTrace:
    """What a generator wrote of one window: scored token sequences, best first, the calls of its model it took, and the
    moves of its beams between them."""

    steps: int
    sequences: tuple[tuple[float, tuple[int, ...]], ...]
    moves: tuple[BeamMove, ...] = ()
