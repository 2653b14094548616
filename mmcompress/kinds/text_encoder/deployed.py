"""A text encoder on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.check_values import Rules
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import (
    TEXT_RULES,
    Values,
    add_prompt,
    choose_padded_length,
    load_tokenizer,
    pad_ids,
)

BATCHED_FROM = 17
"""Texts from which on the tokenizer's thread pool is used: for a few short texts it costs more than
it saves."""


class TextEncoder:
    """One or several texts to embeddings, float32 [n, d] of length 1."""

    CONFIG_RULES: ClassVar[Rules] = TEXT_RULES
    """What the manifest may say of the configuration."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.session = sessions["model"]
        self.config = config
        self.tokenizer = load_tokenizer(folder / config["tokenizer"])

    def __call__(self, text: str | list[str]) -> Values:
        """Embed a text, or several at once."""
        return {"embedding": self.session({"ids": self.prepare(text)})[0]}

    def prepare(self, text: str | list[str]) -> np.ndarray:
        """Return the token ids [n, t] that the model is given."""
        texts = add_prompt([text] if isinstance(text, str) else text, self.config)
        if len(texts) < BATCHED_FROM:
            encodings = [self.tokenizer.encode(one) for one in texts]
        else:
            encodings = self.tokenizer.encode_batch(texts)
        rows = [encoding.ids for encoding in encodings]
        length = choose_padded_length(rows, self.config)
        return pad_ids(rows, length, pad=self.config["pad"], eos=self.config["eos"])
