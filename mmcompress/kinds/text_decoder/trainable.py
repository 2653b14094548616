"""A text decoder in torch: it learns by teacher forcing.

Under greedy decoding a caption is right exactly when every teacher-forced argmax is. Exact match
then costs one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from mmcompress.data.base import Pairs
from mmcompress.kinds.base import (
    FIRST_RANDOM_ID,
    Batch,
    NodeSetup,
    Outputs,
    TrainableWriter,
    compute_share,
)
from mmcompress.models.base import Model
from mmcompress.runtime.beam_search import (
    MASKED_SCORE,
    NO_TOKEN,
    Generation,
    read_generation,
)
from mmcompress.runtime.text import pad_ids

MAX_REFERENCE_TOKENS = 32
"""Next tokens of the dense generator, the likeliest ones, that a pruned one is compared on; the
rest is taken as one."""


class TrainableTextDecoder(TrainableWriter):
    """Token ids [b, t] and the tokens of another node [b, n, w] to logits [b, t, v]."""

    def __init__(self, setup: NodeSetup):
        super().__init__(setup)
        assert setup.tokenizer_json is not None
        self.tokenizer = Tokenizer.from_str(setup.tokenizer_json)
        # some files ask for it, but a text to learn is as long as it is
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.generation = read_generation(setup.config["generation"])

    @property
    def read_nodes(self) -> tuple[str, ...]:
        """The node that gives the context."""
        return (self.setup.sources["context"],)

    def collate(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """Tokenize what should be written, ids [b, t], as the deployed generator starts and ends.

        A text that is too long stops without an end, as the generator does.

        Returns:
            The ids, and which of the positions [b, t - 1] have a next token.
        """
        generation = self.generation
        rows: list[list[int]] = []
        for row in self._tokenize(pairs.generated_texts or pairs.texts):
            rows.append(row[: generation.max_tokens])
        length = max(map(len, rows))
        padded_ids = pad_ids(rows, length, pad=generation.pad, eos=generation.eos)
        lengths = torch.tensor([len(row) for row in rows])
        if generation.forced_end != NO_TOKEN:
            # what stands at the end of the longest text is not the model's choice
            lengths = lengths.clamp(max=generation.max_tokens - 1)
        has_next = torch.arange(1, length) < lengths[:, None]
        return torch.from_numpy(padded_ids), has_next

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, each with start and end.

        What the tokenizer itself would put around a text does not count: its post-processor may
        know no start, another one, or none of both.
        """
        lead = self.setup.config.get("lead", "")
        words = self.tokenizer.encode_batch(
            [lead + text for text in texts], add_special_tokens=False
        )
        start = self.generation.start
        return [[*start, *encoding.ids, self.generation.eos] for encoding in words]

    def forward(self, model: Model, batch: Batch, *, outputs: Outputs) -> dict[str, Tensor]:
        """Return the logits of every next token, given the tokens before it."""
        (source,) = self.read_nodes
        ids = batch.inputs[self.name]
        logits_BTV = model(ids[:, :-1], outputs[source]["tokens"])
        return {"logits": merge_ends(logits_BTV, self.generation)}

    def find_target_positions(self, batch: Batch) -> Tensor:
        """Return the positions whose next token counts [b, t - 1]: all but those within the
        start."""
        has_next = batch.keep[self.name]
        positions = torch.arange(has_next.shape[1], device=has_next.device)
        return has_next & (positions >= len(self.generation.start) - 1)

    @property
    def needs_reference(self) -> bool:
        """A generator that learns from the dense one is compared to all that it might write."""
        return self.setup.labels_by_teacher

    def select_reference(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the likeliest next tokens of the dense generator [b, t, k] and their
        probabilities."""
        if not self.needs_reference:
            return {}
        probabilities = dense["logits"].softmax(-1)
        count = min(MAX_REFERENCE_TOKENS, probabilities.shape[-1])
        predicted_ids = probabilities.topk(count, -1)
        return {"likely": predicted_ids.indices, "share": predicted_ids.values}

    def compute_losses(
        self, batch: Batch, *, outputs: Outputs, reference: Outputs | None
    ) -> dict[str, Tensor]:
        """Return the cross-entropy of the next tokens, or the divergence from the dense generator.

        Cross-entropy on few texts falls as often as it rises with a small cut. The divergence from
        the dense distribution can only rise.
        """
        positions = self.find_target_positions(batch)
        logits = outputs[self.name]["logits"][positions]
        dense = (reference or {}).get(self.name, {})
        if "likely" in dense:
            loss = compute_divergence(
                logits, dense["likely"][positions], share_RK=dense["share"][positions]
            )
        else:
            targets = batch.inputs[self.name][:, 1:][positions]
            loss = functional.cross_entropy(logits, targets)
        return {f"caption.{self.name}": loss}

    def compute_quality(self, batch: Batch, *, outputs: Outputs) -> dict[str, float]:
        """Return the share of tokens, and of whole texts, that are right."""
        positions = self.find_target_positions(batch)
        right = outputs[self.name]["logits"].argmax(-1) == batch.inputs[self.name][:, 1:]
        return {
            "token_accuracy": compute_share(right[positions]),
            "caption_exact_match": compute_share((right | ~positions).all(1)),
        }

    @staticmethod
    def make_random_inputs(
        model: Model, batch_size: int, *, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return random token ids [b, 7] and a random context [b, 9, w]."""
        ids = torch.randint(FIRST_RANDOM_ID, model.vocabulary, (batch_size, 7), generator=generator)
        context = torch.randn(batch_size, 9, model.dims["context"], generator=generator)
        return ids, context


def merge_ends(logits_BTV: Tensor, generation: Generation) -> Tensor:
    """Count every token that ends a text as the one that texts to learn end with.

    Args:
        logits_BTV: Logits of the next tokens.
        generation: How texts end.

    Returns:
        Logits whose main end is as probable as all ends together; the other ends are out of reach.
    """
    if not generation.other_ends:
        return logits_BTV
    merged_BTV = logits_BTV.clone()
    merged_BTV[..., generation.eos] = logits_BTV[..., list(generation.ends)].logsumexp(-1)
    merged_BTV[..., list(generation.other_ends)] = MASKED_SCORE
    return merged_BTV


def compute_divergence(logits_RV: Tensor, likely_RK: Tensor, *, share_RK: Tensor) -> Tensor:
    """Return the mean KL divergence of next-token distributions from the dense ones.

    Args:
        logits_RV: Logits of r positions over v tokens.
        likely_RK: The k likeliest tokens of the dense generator at each position.
        share_RK: Their probabilities. All other tokens count as one.

    Returns:
        A scalar, at least 0.
    """
    own_log_RK = logits_RV.log_softmax(-1).gather(-1, likely_RK)
    rest_R = (1 - share_RK.sum(-1)).clamp(min=1e-6)
    own_rest_R = (1 - own_log_RK.exp().sum(-1)).clamp(min=1e-6)
    likely_R = (share_RK * (share_RK.clamp(min=1e-9).log() - own_log_RK)).sum(-1)
    return (likely_R + rest_R * (rest_R.log() - own_rest_R.log())).mean()
