"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class Nearest:
    """The value whose key is nearest to the query (cosine), plus `prior` times its score where scores are given."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.prior = float(config.get("prior", 0.0))

    def __call__(
        self, query: np.ndarray, keys: np.ndarray, values: list[str], scores: Any = None
    ) -> Values:
        rank = keys @ query[0]
        if scores is not None:
            rank = rank + self.prior * np.asarray(scores)
        return {"best": values[int(rank.argmax())]}
