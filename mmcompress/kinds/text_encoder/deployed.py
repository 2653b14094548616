"""A text encoder on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.check_values import Rules
from mmcompress.runtime.sessions import TimedSession, split_rows
from mmcompress.runtime.text import TEXT_RULES, TextReader, Values, list_texts, load_tokenizer


class TextEncoder:
    """One or several texts to embeddings, float32 [n, d] of length 1."""

    CONFIG_RULES: ClassVar[Rules] = TEXT_RULES
    """What the manifest may say of the configuration."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.session = sessions["model"]
        self.config = config
        self.reader = TextReader(load_tokenizer(folder / config["tokenizer"]), config)

    def __call__(self, text: str | list[str]) -> Values:
        """Embed a text, or several at once."""
        return {"embedding": self.session({"ids": self.prepare(text)})[0]}

    def answer_batch(self, requests: Sequence[Values]) -> list[Values]:
        """Embed the texts of several requests in one call: a `text` each, or a list of them."""
        texts_by_request = [list_texts(request["text"]) for request in requests]
        all_texts = [text for texts in texts_by_request for text in texts]
        results = self.session({"ids": self.prepare(all_texts)})
        return split_rows(
            ("embedding",), results, counts=[len(texts) for texts in texts_by_request]
        )

    def prepare(self, text: str | list[str]) -> np.ndarray:
        """Return the token ids [n, t] that the model is given."""
        return self.reader.read(list_texts(text)).ids
