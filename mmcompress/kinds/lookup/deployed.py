"""The search in a list of texts on a device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mmcompress.errors import BundleError
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class Lookup:
    """Finds the text of a list whose embedding is nearest to the query by cosine.

    The list lies in the bundle: the texts as JSON, and their embeddings [k, d] as the deployed
    encoder gives them.
    """

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        try:
            self.texts = json.loads((folder / config["texts"]).read_text(encoding="utf-8"))
            self.embeddings = np.load(folder / config["bank"], allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder}: the list of a lookup can't be read: {error}") from error
        is_list = isinstance(self.texts, list) and self.embeddings.ndim == 2
        if not is_list or not 0 < len(self.texts) == len(self.embeddings):
            raise BundleError(
                f"{folder}: a lookup needs as many texts as embeddings: "
                f"{config['texts']} and {config['bank']} don't fit"
            )

    def __call__(self, query: np.ndarray) -> Values:
        """Find the nearest text to an embedding [1, d], with its similarity and its place in the
        list."""
        similarity = self.embeddings @ query[0]
        place = int(similarity.argmax())
        return {"best": self.texts[place], "score": float(similarity[place]), "place": place}
