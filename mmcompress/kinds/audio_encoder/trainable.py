"""An audio encoder in torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmcompress.data.base import Pairs
from mmcompress.kinds.base import Batch, Outputs, TrainableNode
from mmcompress.models.base import Model
from mmcompress.runtime.audio import SAMPLE_RATE, TOKENS_PER_SECOND, compute_log_mel

TAIL_TOKENS = 50
"""Tokens behind the end of the sound that count as sound: one second, in which an encoder says that
it ended."""


class TrainableAudioEncoder(TrainableNode):
    """Log-mel features [b, m, f] to an embedding [b, d] and tokens [b, f / 2, w]."""

    def collate(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """Compute the log-mel features of some pairs, and which tokens hold sound or its end."""
        options = dict(self.setup.config["features"])
        features = [compute_log_mel(sound, options) for sound in pairs.inputs]
        features_BMF = torch.from_numpy(np.stack(features))
        ends_B = [
            len(sound) / SAMPLE_RATE * TOKENS_PER_SECOND + TAIL_TOKENS for sound in pairs.inputs
        ]
        positions_N = torch.arange(features_BMF.shape[-1] // 2)
        return features_BMF, positions_N < torch.tensor(ends_B)[:, None]

    def forward(self, model: Model, batch: Batch, *, outputs: Outputs) -> dict[str, Tensor]:
        """Run the encoder on the features of a batch."""
        embedding, tokens = model(batch.inputs[self.name])
        return {"embedding": embedding, "tokens": tokens}

    @staticmethod
    def make_random_inputs(
        model: Model, batch_size: int, *, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return random features [b, m, f]."""
        options = model.config["features"]
        size = (batch_size, options["mels"], options["frames"])
        return (torch.randn(size, generator=generator),)
