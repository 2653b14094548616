"""A fusion encoder on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.check_values import Rules
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import TEXT_RULES, TextReader, Values, load_tokenizer


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
        texts = [text] if isinstance(text, str) else text
        ids = self.reader.read(texts).ids
        results = self.session({"ids": ids, "context": context})
        values: Values = dict(zip(self.session.outputs, results, strict=True))
        values["scores"] = values["scores"].tolist()
        return values
