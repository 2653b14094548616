"""The similarity of two embeddings on a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class Similarity:
    """Two embeddings of length 1 to their cosine."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        """Make the node; it has neither sessions nor a configuration."""

    def __call__(self, query: np.ndarray, keys: np.ndarray) -> Values:
        """Compare two embeddings.

        Args:
            query: The embedding that asks, float32 [1, d].
            keys: The embedding that it is compared with, float32 [1, d].
        """
        return {"score": float(query[0] @ keys[0])}
