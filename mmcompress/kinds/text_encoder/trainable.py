"""A text encoder in torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmcompress.data.base import Pairs
from mmcompress.kinds.base import Batch, NodeSetup, Outputs, TrainableNode
from mmcompress.models.base import Model
from mmcompress.runtime.text import add_prompt, choose_padded_length, pad_ids

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

    Behind a list of texts it reads two texts a pair, ids [b, 2, t]: the query, which is written by
    a generator and has errors, and the text that it should find. It then gives two embeddings,
    `embedding` and `keys`.
    """

    def __init__(self, setup: NodeSetup):
        super().__init__(setup)
        assert setup.tokenizer_json is not None
        self.tokenizer = Tokenizer.from_str(setup.tokenizer_json)

    def collate(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """Tokenize the texts of some pairs; the mask says which positions are no padding."""
        if not self.setup.feeds_list:
            ids = self._tokenize(pairs.texts)
            return ids, ids != self.setup.config["pad"]
        queries = pairs.generated_texts or tuple(drop_words(text) for text in pairs.texts)
        texts: list[str] = []
        for query, wanted in zip(queries, pairs.texts, strict=True):
            texts.extend((query, wanted))
        ids = self._tokenize(texts).unflatten(0, (-1, 2))
        return ids, ids != self.setup.config["pad"]

    def _tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return padded token ids [n, t]."""
        config = dict(self.setup.config)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(add_prompt(texts, config))]
        length = choose_padded_length(rows, config)
        return torch.from_numpy(pad_ids(rows, length, pad=config["pad"], eos=config["eos"]))

    def forward(self, model: Model, batch: Batch, *, outputs: Outputs) -> dict[str, Tensor]:
        """Embed the texts of a batch."""
        ids = batch.inputs[self.name]
        if ids.ndim == 2:
            return {"embedding": model(ids)}
        query, keys = model(ids.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return {"embedding": query, "keys": keys}

    @staticmethod
    def random_inputs(
        model: Model, batch_size: int, *, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return random token ids [b, t] that end in an end token."""
        size = (batch_size, model.config["context_length"])
        ids = torch.randint(3, model.vocabulary, size, generator=generator)
        if model.config["eos"] is not None:
            ids[:, -1] = model.config["eos"]
        return (ids,)
