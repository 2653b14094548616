"""A fusion encoder in torch: it learns to tell the picture of a text from another one.

Shapes in this file:
    b  batch      t  tokens of a text      n  tokens of a picture      w  width of these tokens
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from mmcompress.data.base import Pairs
from mmcompress.kinds.base import (
    Batch,
    NodeSetup,
    Outputs,
    TrainableNode,
    compute_share,
    draw_random_ids,
)
from mmcompress.models.base import Model
from mmcompress.runtime.text import TextReader, parse_tokenizer

RANDOM_CONTEXT_TOKENS = 9
"""Tokens of the random picture that proofs use. Any number would do."""


class TrainableFusionEncoder(TrainableNode):
    """Token ids [b, 2, t] and the tokens of another node [b, n, w] to an embedding, tokens and
    scores.

    Every text is read twice: with its own picture, and with that of the next pair, which gives
    `other_scores`.
    """

    def __init__(self, setup: NodeSetup):
        super().__init__(setup)
        assert setup.tokenizer_json is not None
        self.reader = TextReader(parse_tokenizer(setup.tokenizer_json), dict(setup.config))

    @property
    def read_nodes(self) -> tuple[str, ...]:
        """The node that gives the tokens of the picture."""
        return (self.setup.sources["context"],)

    def collate(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """Tokenize the texts of some pairs, each for two pictures; the mask says which positions
        are no padding."""
        tokenized = self.reader.read(pairs.generated_texts or pairs.texts)
        ids_BT = torch.from_numpy(tokenized.ids)
        is_token_BT = torch.from_numpy(tokenized.is_token)
        return ids_BT[:, None].repeat(1, 2, 1), is_token_BT[:, None].repeat(1, 2, 1)

    def forward(self, model: Model, batch: Batch, *, outputs: Outputs) -> dict[str, Tensor]:
        """Read every text with its own picture, and with another one."""
        (source,) = self.read_nodes
        ids_B2T = batch.inputs[self.name]
        context_BNW = outputs[source]["tokens"]
        context_B2NW = torch.stack([context_BNW, _take_other_pictures(context_BNW)], 1)
        embedding, tokens, scores = model(ids_B2T.flatten(0, 1), context_B2NW.flatten(0, 1))
        # The texts with their own pictures are the even rows.
        return {
            "embedding": embedding[::2],
            "tokens": tokens[::2],
            "scores": scores[::2],
            "other_scores": scores[1::2],
        }

    @property
    def needs_reference(self) -> bool:
        """Labels by the teacher are its scores; an embedding that nothing judges needs it too."""
        return self.setup.labels_by_teacher or super().needs_reference

    def select_reference(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scores of the dense model, and its embedding where nothing judges that."""
        if not self.needs_reference:
            return {}
        names = ["scores", "other_scores"]
        if self.setup.is_unjoined:
            names.append("embedding")
        return {name: dense[name] for name in names}

    def compute_losses(
        self, batch: Batch, *, outputs: Outputs, reference: Outputs | None
    ) -> dict[str, Tensor]:
        """Return the cross-entropy of matching (ALBEF, Li et al. 2021, section 3.2).

        The right answers are those of the data, or those of the dense model where it gives the
        labels.
        """
        parts = super().compute_losses(batch, outputs=outputs, reference=reference)
        own_outputs = outputs[self.name]
        logits = torch.cat([own_outputs["scores"], own_outputs["other_scores"]])
        target_shares = torch.cat(
            [torch.ones_like(own_outputs["scores"]), torch.zeros_like(own_outputs["other_scores"])]
        )
        if self.setup.labels_by_teacher and reference is not None:
            dense = reference[self.name]
            target_shares = torch.cat([dense["scores"], dense["other_scores"]]).sigmoid()
        loss = functional.binary_cross_entropy_with_logits(logits, target_shares)
        return {**parts, f"match.{self.name}": loss}

    def compute_quality(self, batch: Batch, *, outputs: Outputs) -> dict[str, float]:
        """Return the share of texts that fit their own picture better than another one."""
        own_outputs = outputs[self.name]
        return {
            "match_accuracy": compute_share(own_outputs["scores"] > own_outputs["other_scores"])
        }

    @staticmethod
    def make_random_inputs(
        model: Model, batch_size: int, *, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return random ids [b, t] that end in an end token, and a random context [b, n, w]."""
        ids = draw_random_ids(model, batch_size, generator=generator)
        context_size = (batch_size, RANDOM_CONTEXT_TOKENS, model.dims["context"])
        return ids, torch.randn(context_size, generator=generator)


def _take_other_pictures(context_BNW: Tensor) -> Tensor:
    """Return the tokens of another picture for every pair: the next one's.

    A pair that is alone gets an empty picture.
    """
    if len(context_BNW) == 1:
        return torch.zeros_like(context_BNW)
    return context_BNW.roll(-1, 0)
