"""The choice among a few texts on a device."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.check_values import Rules, require_number
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class Nearest:
    """Chooses the text whose embedding is nearest to the query by cosine.

    Where the texts come with scores, `prior` times the score of each counts beside its similarity.
    """

    CONFIG_RULES: ClassVar[Rules] = {"prior": require_number(-1e6, 1e6)}
    """What the manifest may say of the configuration."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.prior = float(config.get("prior", 0.0))

    def __call__(
        self,
        query: np.ndarray,
        keys: np.ndarray,
        values: str | list[str],
        scores: list[float] | None = None,
    ) -> Values:
        """Choose one of k texts.

        Args:
            query: The embedding that asks, float32 [1, d].
            keys: The embeddings of the texts, float32 [k, d].
            values: The texts.
            scores: A score for each text, as its generator gave it.
        """
        texts = [values] if isinstance(values, str) else values
        rank = keys @ query[0]
        if scores is not None:
            rank = rank + self.prior * np.asarray(scores)
        return {"best": texts[int(rank.argmax())]}
