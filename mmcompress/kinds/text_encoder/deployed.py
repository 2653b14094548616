"""TODO."""

from __future__ import annotations

from pathlib import Path

from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values, load_tokenizer, pad_ids, choose_padded_length


class TextEncoder:
    """text (one or several) -> embedding float32 [n, d] of length 1."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.model, self.config = sessions["model"], config
        self.tokenizer = load_tokenizer(folder / config["tokenizer"])

    def __call__(self, text: str | list[str]) -> Values:
        texts = [text] if isinstance(text, str) else text
        # a thread pool costs more than a few short texts
        many = len(texts) > 16
        ids = [
            e.ids
            for e in (
                self.tokenizer.encode_batch(texts) if many else map(self.tokenizer.encode, texts)
            )
        ]
        padded = pad_ids(
            ids,
            choose_padded_length(ids, self.config),
            pad=self.config["pad"],
            eos=self.config["eos"],
        )
        return {"embedding": self.model({"ids": padded})[0]}
