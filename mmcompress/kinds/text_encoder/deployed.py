"""A text encoder on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.check_values import Rules
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import TEXT_RULES, TextReader, Values, load_tokenizer


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

    def prepare(self, text: str | list[str]) -> np.ndarray:
        """Return the token ids [n, t] that the model is given."""
        texts = [text] if isinstance(text, str) else text
        return self.reader.read(texts).ids
