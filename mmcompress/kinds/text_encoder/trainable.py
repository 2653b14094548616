"""A text encoder in torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.data.base import Pairs
from mmcompress.kinds.base import Batch, NodeSetup, Outputs, TrainableNode, draw_random_ids
from mmcompress.models.base import Model
from mmcompress.runtime.text import TextReader, parse_tokenizer

DROPPED_WORD_SHARE = 0.15
"""Share of words left out of the text that queries a list: about what a speech recognizer gets
wrong."""


def drop_words(text: str) -> str:
    """Return a text without some of its words, the same ones every time."""
    dice = random.Random(text)
    words = text.split()
    kept_words = [word for word in words if dice.random() > DROPPED_WORD_SHARE]
    return " ".join(kept_words or words[:1])


class TrainableTextEncoder(TrainableNode):
    """Token ids [b, t] to an embedding [b, d].

    Behind a list of texts it reads two texts a pair, ids [b, 2, t]. The first is the query, which a
    generator writes, with errors. The second is the text that it should find. It then gives two
    embeddings, `embedding` and `keys`.
    """

    def __init__(self, setup: NodeSetup):
        super().__init__(setup)
        assert setup.tokenizer_json is not None
        self.reader = TextReader(parse_tokenizer(setup.tokenizer_json), dict(setup.config))

    def collate(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """Tokenize the texts of some pairs; the mask says which positions are no padding."""
        if not self.setup.feeds_list:
            return self._tokenize(pairs.texts)
        queries = pairs.generated_texts or tuple(drop_words(text) for text in pairs.texts)
        texts: list[str] = []
        for query, target_text in zip(queries, pairs.texts, strict=True):
            texts.extend((query, target_text))
        ids, is_token = self._tokenize(texts)
        return ids.unflatten(0, (-1, 2)), is_token.unflatten(0, (-1, 2))

    def _tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return padded token ids [n, t], and which of them are no padding."""
        tokenized = self.reader.read(texts)
        return torch.from_numpy(tokenized.ids), torch.from_numpy(tokenized.is_token)

    def forward(self, model: Model, batch: Batch, *, outputs: Outputs) -> dict[str, Tensor]:
        """Embed the texts of a batch."""
        ids = batch.inputs[self.name]
        if ids.ndim == 2:
            return {"embedding": model(ids)}
        query, keys = model(ids.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return {"embedding": query, "keys": keys}

    @staticmethod
    def make_random_inputs(
        model: Model, batch_size: int, *, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return random token ids [b, t] that end in an end token."""
        return (draw_random_ids(model, batch_size, generator=generator),)
