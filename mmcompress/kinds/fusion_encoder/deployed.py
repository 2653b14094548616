"""A fusion encoder on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.check_values import Rules
from mmcompress.runtime.sessions import TimedSession, split_rows
from mmcompress.runtime.text import TEXT_RULES, TextReader, Values, list_texts, load_tokenizer


class FusionEncoder:
    """One or several texts, read together with one picture."""

    CONFIG_RULES: ClassVar[Rules] = TEXT_RULES
    """What the manifest may say of the configuration."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.session = sessions["model"]
        self.config = config
        self.reader = TextReader(load_tokenizer(folder / config["tokenizer"]), config)

    def __call__(self, text: str | list[str], context: np.ndarray) -> Values:
        """Read k texts together with a picture.

        Args:
            text: One text, or several.
            context: The tokens of the picture, float32 [1, n, w].

        Returns:
            `embedding` float32 [k, d] of length 1, `tokens` float32 [k, t, d], and `scores`: for
            each text the log-odds that it describes the picture.
        """
        return self.answer_batch([{"text": text, "context": context}])[0]

    def answer_batch(self, requests: Sequence[Values]) -> list[Values]:
        """Read the texts of several requests in one call, each together with its picture.

        Args:
            requests: A `text` or several, and a `context` each, as `__call__` takes them.
        """
        texts: list[str] = []
        counts: list[int] = []
        contexts: list[np.ndarray] = []
        for request in requests:
            own_texts = list_texts(request["text"])
            texts += own_texts
            counts.append(len(own_texts))
            contexts.append(request["context"])
        context = contexts[0]
        if len(contexts) > 1:
            # Texts of one picture share it; those of several have one each.
            context = np.repeat(np.concatenate(contexts), counts, 0)
        results = self.session({"ids": self.reader.read(texts).ids, "context": context})
        answers = split_rows(self.session.outputs, results, counts=counts)
        for values in answers:
            values["scores"] = values["scores"].tolist()
        return answers
