"""TODO."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mmcompress.errors import BundleError
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class Lookup:
    """The text of a list whose embedding is nearest to the query (cosine), with its similarity and its place."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        try:
            self.texts = json.loads((folder / config["texts"]).read_text())
            self.bank = np.load(folder / config["bank"], allow_pickle=False)
        except (OSError, ValueError) as e:
            raise BundleError(f"{folder}: the list of a lookup can't be read: {e}") from e

    def __call__(self, query: np.ndarray) -> Values:
        rank = self.bank @ query[0]
        at = int(rank.argmax())
        return {"best": self.texts[at], "score": float(rank[at]), "place": at}
